"""The step between two scales: head, guidance, drawing, sum, embedding. Families differ in drawing and resizing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ....core.schedule import Size
from ....families.base import TransformerShape
from ..common.rows import ANY, OpenDims, Shapes, Weights, first, modulate, stand_in, tokens_of
from ..common.steps import Step
from .block_steps import LARGER, SIZE

BETWEEN = (8, 9)  # the grid that stands for all next ones
MATRICES = ("enlarge_0", "enlarge_1", "shrink_0", "shrink_1")

Matrix = Callable[[int, int], NDArray[Any]]  # (cells before, cells after) -> [after, before]


class SamplingHeadStep(Step, ABC):
    """From the last block of one scale to the first of the next.

    x [L * R, C], head_modulation [Rt, 2, C], noise [L * B, n], summed [B, channels, H, W] and the family's own inputs
    -> logits [L * B, n] (guided, not filtered), summed_out, the family's own outputs, and except at the last scale
    x_next [L' * Rn, C]. B counts images. R, the rows, is B where guidance is off, else 2 * B; Rn are those of the next
    scale, Rt those of the first.
    """

    enlarge_0: Tensor  # matrices [final, own] and [next, final], per axis
    enlarge_1: Tensor
    shrink_0: Tensor
    shrink_1: Tensor

    resizing: ClassVar[tuple[Matrix, Matrix]]  # a scale's codes to the final grid, the sum to the next scale's
    place_table: ClassVar[str]  # the weight that holds level and position embeddings
    place_buffer: ClassVar[str] = "places"  # its rows for the next scale: one for each token, or one for all
    head_weights: ClassVar[tuple[str, ...]] = ("head.weight", "head.bias")

    def __init__(
        self,
        config: TransformerShape,
        rows: int,
        size: Size,
        final: Size,
        next_size: Size | None,
        next_index: int | None,
        text_rows: int = 0,
        next_rows: int = 0,
        images: int = 1,
    ) -> None:
        super().__init__()
        self.images, self.has_guidance = images, rows > images
        self.config, self.rows, self.size, self.final = config, rows, size, final
        self.text_rows, self.next_rows = text_rows or rows, next_rows or rows
        self.next_size, self.next_index = next_size, next_index
        self.outputs = ("logits", "summed_out", *self.further_outputs(), *(() if next_size is None else ("x_next",)))
        self.weights = (*self.head_weights, *self.drawing_weights())
        if size != final:
            self._matrices("enlarge", size, final, self.resizing[0])
        if next_size is not None:
            self.weights += ("word_embed.weight", "word_embed.bias", self.place_table)
            self.register_buffer(self.place_buffer, self.next_places(), persistent=False)
            self._matrices("shrink", final, next_size, self.resizing[1])

    # What a family says

    def drawing_weights(self) -> tuple[str, ...]:
        """Weights between those of the head and those of the embedding."""
        return ()

    def further_outputs(self) -> tuple[str, ...]:
        """Outputs that only this family writes."""
        return ()

    @abstractmethod
    def further_shapes(self) -> Shapes:
        """Shapes of noise and logits, and of the family's own inputs and outputs."""

    @abstractmethod
    def next_places(self) -> Tensor:
        """Rows of the place table for the next scale's tokens (int64)."""

    def head_input(self, x: Tensor, modulation: Tensor, weights: Weights) -> Tensor:
        """x [L * R, C], scale and shift [R, 2, C] -> input of the head [L * R, C]."""
        return modulate(x, modulation[:, 0], modulation[:, 1], self.rows)

    # Shapes

    def tokens(self) -> int:
        """Tokens of the scale as its blocks see them."""
        return tokens_of(self.size)

    def cells(self, size: Size) -> Size:
        """Tokenizer grid cells of a token grid."""
        return size[0] * self.config.patch, size[1] * self.config.patch

    def open_dims(self) -> OpenDims:
        tokens: OpenDims = {name: {0: ANY} for name in ("x", "logits", "x_next", *self.further_shapes())}
        sums: OpenDims = {name: {2: ANY, 3: ANY} for name in ("summed", "summed_out")}
        return {**tokens, **{name: {0: ANY, 1: ANY} for name in MATRICES}, **sums}

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        size, final, following = (arguments[name] for name in ("size", "final", "next_size"))
        own = stand_in(size, SIZE)
        sizes: dict[str, Any] = {"size": own, "final": own if size == final else stand_in(final, LARGER)}
        if following is not None:
            sizes |= {"next_size": stand_in(following, BETWEEN), "next_index": 1}
        return {**arguments, **sizes}

    def border(self) -> Shapes:
        c = self.config
        summed = (self.images, c.code_channels // c.patch**2, *self.cells(self.final))
        return {
            "x": (self.tokens() * self.rows, c.width),
            "head_modulation": (self.text_rows, 2, c.width),
            **dict.fromkeys(("summed", "summed_out"), summed),
            **dict.fromkeys(("tau", "cut", "guidance"), (self.images,)),
            "x_next": (tokens_of(self.next_size or self.size) * self.next_rows, c.width),
            **self.further_shapes(),
        }

    def _matrices(self, name: str, source: Size, target: Size, matrix: Matrix) -> None:
        for axis, (before, after) in enumerate(zip(self.cells(source), self.cells(target), strict=True)):
            self.register_buffer(f"{name}_{axis}", torch.from_numpy(matrix(before, after)).float(), persistent=False)

    # Arithmetic

    def head(self, x: Tensor, head_modulation: Tensor, weights: Weights) -> Tensor:
        """x [L * R, C] -> logits [L, G, B * n], fp32; G is two with guidance, else one."""
        h = self.head_input(x, first(head_modulation, self.rows), weights).to(weights["head.weight"].dtype)
        logits = F.linear(h, weights["head.weight"], weights["head.bias"]).float()
        return logits.view(-1, self.rows // self.images, self.images * weights["head.bias"].shape[0])

    def of_each(self, setting: Tensor, count: int) -> Tensor:
        """A setting of each image [B] for all its `count` logits [B * count]."""
        return setting if self.images == 1 else setting.repeat_interleave(count)

    def of_each_token(self, setting: Tensor, drawn: Tensor) -> Tensor:
        """A setting of each image [B] for what each draws, [L * B, ...]: [L * B, 1]."""
        return setting if self.images == 1 else setting.repeat(drawn.shape[0] // self.images).unsqueeze(1)

    def grids(self, codes: Tensor, size: tuple[int, int]) -> Tensor:
        """What tokens are, [L * B, n], as maps [B, n, h, w]."""
        if self.images > 1:
            codes = codes.view(-1, self.images * codes.shape[1])
        return codes.transpose(0, 1).reshape(self.images, -1, *size)

    def embedded(self, summed: Tensor, weights: Weights) -> Tensor:
        """Tokens of the next scale [L' * Rn, C]: the sum resized, embedded, and put in its place."""
        following = self.shrink_0 @ summed @ self.shrink_1.t()
        if self.config.patch > 1:
            following = F.pixel_unshuffle(following, self.config.patch)
        flat = following.flatten(2)  # [B, channels, L']
        tokens = flat.squeeze(0).transpose(0, 1) if self.images == 1 else flat.permute(2, 0, 1).flatten(0, 1)
        tokens = tokens.to(weights["word_embed.weight"].dtype)  # [L' * B, channels]
        out = F.linear(tokens, weights["word_embed.weight"], weights["word_embed.bias"]).float()
        places = weights[self.place_table].index_select(0, getattr(self, self.place_buffer))  # of each token, or of all
        if self.images > 1:
            width = self.images * self.config.width
            out = (out.view(-1, self.images, self.config.width) + places.unsqueeze(1)).view(-1, width)
        else:
            out = out + places
        return out.unsqueeze(1).expand(-1, self.next_rows // self.images, -1).reshape(-1, self.config.width)
