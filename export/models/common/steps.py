"""What step modules have in common: the shapes at their border, and sizes that their tensors tell."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from ....families.base import TransformerShape
from .rows import Shapes


class Step(nn.Module):
    """A step module (step_graph.StepModule): its inputs, outputs and weights by name, every shape static."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]

    @abstractmethod
    def border(self) -> Shapes:
        """Shapes of all inputs and outputs, and perhaps of others, by name."""

    def input_shapes(self) -> Shapes:
        """Shapes of the inputs in their order."""
        border = self.border()
        return {name: border[name] for name in self.inputs}

    def output_shapes(self) -> Shapes:
        """Shapes of the outputs in their order."""
        border = self.border()
        return {name: border[name] for name in self.outputs}

    def take_sizes(self, memory: dict[str, Tensor]) -> None:
        """Nothing is taken where the shapes of the inputs tell every size (see step_graph.OpenModule)."""


class ImageStep(Step):
    """A step that runs once for all images of a pass: `rows` rows, prompts of `text_length` tokens with padding."""

    def __init__(self, config: TransformerShape, rows: int, text_length: int = 0, images: int = 1) -> None:
        super().__init__()
        self.config, self.rows, self.text_length, self.images = config, rows, text_length, images

    def of_images(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what each image has: that of one image, or of several in a row."""
        return shape if self.images == 1 else (self.images, *shape)
