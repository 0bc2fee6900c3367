"""How a family's models become step graphs: each family has one subclass, at the end of its `steps.py`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from ....core.plan import GenerationPlan, StepPlan
from ....core.schedule import Size
from ....errors import CheckpointError
from ....families.base import Family, ImageTokenizerShape, TransformerT
from ..common.coders import ImageDecoder, ImageEncoder, image_tokenizer_role
from ..common.rows import Shapes
from ..common.step_graph import StepGraph
from ..common.weights import Role, Sources, State
from .block_steps import AttnMlpStep, QkvStep
from .published_models import PublishedModel, TrainingKeys

LAYER_PREFIX = "transformer.blocks.{layer}."
SHARED_PREFIX = "transformer."

ImagesT = TypeVar("ImagesT", bound=ImageTokenizerShape)


@dataclass(frozen=True)
class ExportContext(Generic[TransformerT, ImagesT]):
    """The plan, configurations and sizes that graphs are made for."""

    plan: GenerationPlan
    transformer: TransformerT  # configurations of the family
    image_tokenizer: ImagesT
    text_length: int
    guidance_rows: int  # of an image, at the first scale
    images: int = 1

    @property
    def rows(self) -> int:
        """Rows at the first scale: the conditional ones of all images, then the unconditional ones."""
        return self.guidance_rows * self.images

    def rows_of(self, step: StepPlan) -> int:
        """Rows of a step."""
        return step.rows(self.guidance_rows, self.images)

    @property
    def label(self) -> str:
        """Of a graph that knows rows alone, not which are of one image."""
        return f"t{self.text_length}-r{self.rows}" if self.text_length else f"r{self.rows}"

    @property
    def of_images(self) -> str:
        """Behind the label of a graph that knows images."""
        return f"-b{self.images}" if self.images > 1 else ""

    def following(self, step: StepPlan) -> StepPlan | None:
        """The first step of the next executed scale."""
        return next((later for later in self.plan.steps if later.index == step.next_index), None)

    def rows_label(self, step: StepPlan) -> str:
        """r2, or r1of2 where guidance has been switched off."""
        own = self.rows_of(step)
        return f"r{own}" if own == self.rows else f"r{own}of{self.rows}"


class ModelAdapter(ABC, Generic[TransformerT, ImagesT]):
    """The exporter's side of a family: modules under the official key names, their weights, and step graphs.

    The family's configurations, of transformer and image tokenizer, are what it is generic over.
    """

    family: ClassVar[Family[Any]]
    marker: ClassVar[str]  # a tensor that only this family's transformers have
    transformer: ClassVar[type[nn.Module]]  # made with its configuration
    image_tokenizer: ClassVar[type[nn.Module]]
    qkv: ClassVar[type[QkvStep]]
    attn_mlp: ClassVar[type[AttnMlpStep]]
    decoder: ClassVar[type[ImageDecoder]]
    encoder: ClassVar[type[ImageEncoder] | None]  # None: images of this family cannot be edited
    decoder_prefix: ClassVar[str] = "image_tokenizer.decoder."
    encoder_prefix: ClassVar[str] = "image_tokenizer.encoder."
    tiles_decoder: ClassVar[bool] = True
    decoder_parts: ClassVar[tuple[str, ...]] = ("decoder.",)  # prefixes of the tokenizer's tensors that it reads
    encoder_parts: ClassVar[tuple[str, ...]] = ("encoder.",)
    published: ClassVar[tuple[PublishedModel, ...]] = ()  # names that the family's models are published under
    image_tokenizers: ClassVar[tuple[str, ...]] = ()  # further names of image tokenizers, of no published model
    training_keys: ClassVar[TrainingKeys] = TrainingKeys()  # keys of its training program's checkpoints
    text_encoders: ClassVar[tuple[str, ...]] = ()  # kinds that the family's models are published with
    derived: ClassVar[re.Pattern[str]] = re.compile(r"$^")  # stored tensors that follow from the configuration

    def check_parts(self, transformer: TransformerT, images: ImagesT) -> None:
        """Check that transformer and image tokenizer were trained together.

        Raises:
            CheckpointError: they were not.
        """
        if transformer.code_channels != images.code_channels:
            raise CheckpointError(
                f"the transformer predicts codes of {transformer.code_channels} channels, "
                f"the image tokenizer reads {images.code_channels}",
                fix="give the image tokenizer that the transformer was trained with",
            )

    @abstractmethod
    def infer_transformer(self, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]) -> TransformerT:
        """Configuration from the tensors, completed by the settings of a config.json.

        Raises:
            CheckpointError: the tensors are not those of this family, the settings contradict them, or neither says
                what the model needs.
        """

    @abstractmethod
    def infer_image_tokenizer(self, shapes: Mapping[str, tuple[int, ...]]) -> ImagesT:
        """Configuration from the tensors alone.

        Raises:
            CheckpointError: the tensors are not those of this family.
        """

    @abstractmethod
    def weights(self, transformer: TransformerT, state: State, images: ImagesT, images_state: State) -> Sources:
        """The "transformer.*" tensors that step graphs are bound to, from the official ones; nothing is read yet."""

    @abstractmethod
    def conditioning(self, context: ExportContext[TransformerT, ImagesT]) -> StepGraph:
        """The graph that runs once an image: prompt or class -> first tokens, and inputs of every scale."""

    def layer_conditioning(self, context: ExportContext[TransformerT, ImagesT]) -> StepGraph | None:
        """The graph that runs once an image for each layer; None where layers have no inputs of their own."""
        return None

    @abstractmethod
    def sampling_head(self, context: ExportContext[TransformerT, ImagesT], step: StepPlan) -> StepGraph:
        """The graph from the last block of a scale to the first of the next."""

    def pick(self, context: ExportContext[TransformerT, ImagesT], step: StepPlan) -> StepGraph | None:
        """The graph that picks the tokens of a part of a scale; None where scales have no parts."""
        return None

    def residual(self, context: ExportContext[TransformerT, ImagesT], step: StepPlan) -> StepGraph | None:
        """The graph behind the sampling head that adds a residual to the codes; None where there is none."""
        return None

    def grid(self, context: ExportContext[TransformerT, ImagesT], step: StepPlan) -> Size:
        """The token grid of a step as its blocks see it."""
        return step.size

    def qkv_arguments(self, context: ExportContext[TransformerT, ImagesT], step: StepPlan) -> dict[str, Any]:
        """Arguments of the first half of a block beside those of all families."""
        return {}

    def attn_mlp_arguments(self, context: ExportContext[TransformerT, ImagesT], step: StepPlan) -> dict[str, Any]:
        """Arguments of the second half of a block beside those of all families."""
        return {}

    def image_role(self, name: str) -> Role:
        """The role of a tensor of the image tokenizer."""
        return image_tokenizer_role(name)

    def kept_shapes(self, shapes: Shapes, with_encoder: bool) -> Shapes:
        """The image tokenizer's tensors that go into a bundle as they are."""
        parts = self.decoder_parts + (self.encoder_parts if with_encoder else ())
        return {name: shape for name, shape in shapes.items() if name.startswith(parts)}


def size_label(size: Size) -> str:
    """A grid as names of graphs have it: "16x24", rows first."""
    return f"{size[0]}x{size[1]}"


def sampling_head_graph(
    factory: type[nn.Module], arguments: dict[str, Any], context: ExportContext[Any, Any], step: StepPlan
) -> StepGraph:
    """A sampling head from a scale to the next one, with its name and the arguments of all families."""
    following, final = context.following(step), context.plan.schedule.final
    own, further = context.rows_of(step), context.rows_of(following) if following else 0
    arguments = {**arguments, "rows": own, "text_rows": context.rows, "images": context.images}
    arguments |= {"size": step.size, "final": final}
    arguments |= {"next_size": following and following.size, "next_index": step.next_index, "next_rows": further}
    onward = "end" if following is None else f"{size_label(following.size)}@{step.next_index}"
    label = context.rows_label(step) + (f"to{further}" if following and further < own else "") + context.of_images
    name = f"sampling_head-{size_label(step.size)}-{onward}-of-{size_label(final)}-{label}"
    return StepGraph(name, factory, arguments, SHARED_PREFIX)
