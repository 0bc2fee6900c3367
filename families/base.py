"""A family of models for runtime and command line: sizes, schedules, policies, settings. Nouns only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ..core.plan import GenerationPlan, SamplingMode, make_plan
from ..core.policy import Preset, PruningPolicy, load_policy
from ..core.schedule import ScaleSchedule, Size, find_schedule, parse_size, square_schedule
from ..errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class TransformerShape:
    """The part of a transformer's configuration that all families have; the whole is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    depth: int
    width: int
    heads: int
    mlp_width: int
    max_scales: int  # scales of the longest schedule
    text_length: int  # longest prompt in tokens; 0 where there are no prompts
    text_width: int  # channels of the text features; 0 where there are no prompts
    classes: int  # 0 where images are not of classes
    code_channels: int  # of what one token predicts

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def first_tokens(self) -> int:
        """Tokens of the first scale: one, that stands for the prompt or the class, or the whole prompt."""
        return 1

    @property
    def patch(self) -> int:
        """Tokenizer grid cells along one side of a token."""
        return 1


class SquareScales(TransformerShape):
    """A transformer that draws codes of a codebook, at the one size it was made for, on square token grids."""

    scales: tuple[int, ...]  # side of every token grid
    codes: int  # rows of the image tokenizer's codebook

    @property
    def max_scales(self) -> int:  # type: ignore[override]  # nothing writes it
        return len(self.scales)

    @property
    def schedule(self) -> ScaleSchedule:
        return square_schedule(self.scales)


class ImageTokenizerShape:
    """The part of an image tokenizer's configuration that all families have; the whole is a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    code_channels: int  # of the latent that the decoder reads
    base_channels: int  # of the encoder's first convolution
    channel_multipliers: tuple[int, ...]
    residual_blocks: int  # per resolution of the encoder; the decoder has one more

    @property
    def patch_size(self) -> int:
        """Pixels along one side of a latent grid cell."""
        return 1 << (len(self.channel_multipliers) - 1)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels per resolution, the finest first."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)


TransformerT = TypeVar("TransformerT", bound=TransformerShape)
ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


@dataclass(frozen=True)
class SamplingDefaults:
    """What `Pipeline` uses where the caller says nothing. None: the family knows no such setting."""

    guidance_scale: float = 3.0
    tau: float | None = 1.0
    top_p: float = 0.97
    top_k: int | None = None


@dataclass(frozen=True)
class PromptFormat:
    """How a model was trained to read prompts: behind which text, and padded how to the text length."""

    prefix: str = ""  # tokenized apart; its features are not kept
    pad_id: int = 0
    pad_left: bool = False
    keeps_padding: bool = False  # features of padding are real, and read


@dataclass(frozen=True)
class Family(Generic[TransformerT]):
    """One family of models.

    `guidance_off` is the guidance scale at which the unconditional row has no weight. `draws` names what an image is
    drawn from: a "prompt" or a "class label".
    """

    name: str
    transformer: type[TransformerT]
    image_tokenizer: type[ImageTokenizerShape]
    transformers: Mapping[str, TransformerT]  # published sizes by name
    image_tokenizer_for: Callable[[TransformerT], ImageTokenizerShape]
    schedules: Callable[[TransformerT], dict[Size, ScaleSchedule]]  # by image (height, width) in pixels
    presets: Mapping[str, Preset]
    transformer_from_json: Callable[[dict[str, Any]], TransformerT]  # as a manifest holds it
    settings_from_json: Callable[[Mapping[str, Any]], dict[str, Any]]  # as a config.json beside a transformer says it
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    guidance_off: float = 1.0
    draws: str = "prompt"
    attends_to_text: bool = False  # by a cross-attention in every block
    drawings: frozenset[str] = frozenset()  # fields of `SamplingMode` that the family knows
    default_size: Size | None = None  # (height, width) in pixels; the largest by default
    shapes: Callable[[], Sequence[Size]] = tuple  # sizes that a shape as 16:9 may stand for

    def size(self, text: str | None, transformer: TransformerT) -> Size:
        """The image size that a text stands for, (height, width) in pixels; the default size for None.

        Raises:
            PlanError: not a size.
        """
        if text is None:
            return self.default_size or max(self.schedules(transformer))
        return parse_size(text, self.shapes())

    def schedule_for(self, size: Size, transformer: TransformerT) -> ScaleSchedule:
        """The schedule of an image size in pixels.

        Raises:
            PlanError: the model does not draw that size.
        """
        return find_schedule(size, self.schedules(transformer))

    def policy(self, name_or_file: str, schedule: ScaleSchedule, depth: int) -> PruningPolicy:
        """A preset of this family, or a policy file.

        Raises:
            PlanError: neither.
        """
        return load_policy(name_or_file, schedule, depth, self.presets)

    def plan(
        self,
        schedule: ScaleSchedule,
        policy: PruningPolicy,
        transformer: TransformerT,
        sampling_mode: SamplingMode | None = None,
    ) -> GenerationPlan:
        """Lay out a generation.

        Raises:
            PlanError: policy, schedule and model do not go together, or the family draws in no such way.
        """
        sampling_mode = sampling_mode or SamplingMode()
        for name in sampling_mode.asked_for:
            if name not in self.drawings:
                raise PlanError(
                    f"{self.name} models do not know {name.replace('_', ' ')}",
                    expected=f"one of {', '.join(sorted(self.drawings))}" if self.drawings else "no such option",
                    fix="leave it away",
                )
        if not self.attends_to_text and any(not rule.text for rule in policy.rules.values()):
            raise PlanError(
                f"policy {policy.name!r} has text off, and {self.name} models have no cross-attention to leave out",
                expected="a policy without text = false",
            )
        return make_plan(schedule, policy, transformer.depth, sampling_mode, transformer.first_tokens)


def own_schedule(transformer: SquareScales) -> dict[Size, ScaleSchedule]:
    """`Family.schedules` of families whose models draw at the one size that they were made for."""
    return {transformer.schedule.pixels: transformer.schedule}


def to_json(config: DataclassInstance) -> dict[str, Any]:
    """A configuration as a plain dictionary, tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def from_fields(kind: type[ConfigT], data: dict[str, Any]) -> ConfigT:
    """A configuration from its own fields, lists as tuples.

    Raises:
        CheckpointError: a field is unknown or missing.
    """
    try:
        return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
    except TypeError as error:
        raise CheckpointError(
            f"model configuration not understood: {error}",
            expected=f"the fields {', '.join(own.name for own in fields(kind))}",
        ) from error
