"""The halves of HART's blocks: learned RMSNorm, rotary positions of prompt and image tokens, gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.schedule import Size
from ....families.hart import HartConfig
from ..common.rows import ANY, OpenDims, Shapes, Weights, first, of_rows, rms_norm, scale_rows, tokens_of, unit
from ..transformer.block_steps import LARGER, AttnMlpStep, QkvStep, SubLayer, Tensors
from ..transformer.layers import QUARTER
from .model import ROTARY_BASE


class Qkv(QkvStep):
    """HART's first half: RMSNorm, rotary positions.

    It reads besides x: context_positions [T * Rt] at the first scale, offset [Rt] (fp32) at all others; positions
    [k * B], the tokens' numbers in the scale (int64), for a part of a scale; modulation [Rt, 6, C] in modulated models.
    """

    grid: Tensor  # [L, 2]: row and column of every token of the scale, on the final grid
    frequencies: Tensor

    def __init__(
        self,
        config: HartConfig,
        rows: int,
        size: Size,
        kept: int,
        given: tuple[str, ...],
        scale: Size,
        final: Size,
        text_rows: int = 0,
        images: int = 1,
    ) -> None:
        """images: how many have positions of their own."""
        super().__init__(config, rows, size, kept, text_rows, given)
        self.images = images
        self.unit_queries = config.unit_queries
        self.weights += ("norm.weight",) + (("sa.q_scale",) if config.unit_queries else ())
        channels = config.head_dim
        if "offset" in given:
            channels //= 2  # rows turn the first half, columns the second
            axes = (torch.arange(n) / n * end for n, end in zip(scale, final, strict=True))
            grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
            self.register_buffer("grid", grid, persistent=False)
        falling = ROTARY_BASE ** -(torch.arange(0, channels, 2).float() / channels)
        self.register_buffer("frequencies", falling, persistent=False)

    def given_shapes(self) -> Shapes:
        Rt, k = self.text_rows, tokens_of(self.size)
        shapes: Shapes = {"context_positions": (k * Rt,), "offset": (Rt,), "positions": (k * self.images,)}
        return {name: (shapes | {"modulation": (Rt, 6, self.config.width)})[name] for name in self.given}

    def open_dims(self) -> OpenDims:
        own: OpenDims = {
            "grid": {0: ANY if "positions" in self.given else ("tokens", 1)},
            "positions": {0: ("tokens", self.images)},
        }
        return {**own, "context_positions": {0: ("tokens", self.text_rows)}, **super().open_dims()}

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        found = super().stand_in(arguments)
        whole = LARGER if "positions" in arguments["given"] else found["size"]
        return {**found, "scale": whole, "final": LARGER}

    def normed(self, x: Tensor, given: Tensors, weights: Weights) -> Tensor:
        return modulated(rms_norm(x, weights["norm.weight"]), given, self.rows, 0)

    def positioned(
        self, q: Tensor, k: Tensor, token: Tensor | None, given: Tensors, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        angles = self._image_angles(token, given) if "offset" in given else self._context_angles(given)
        if self.unit_queries:
            queries, keys = unit(q.float()) * weights["sa.q_scale"].view(-1, 1), unit(k.float())
        else:
            queries, keys = q.float() * (QUARTER * self.config.head_dim**-0.5), k.float()
        return turned(queries, angles, q.dtype), turned(keys, angles, k.dtype)

    def _context_angles(self, given: Tensors) -> tuple[Tensor, Tensor]:
        angles = given["context_positions"].view(-1, self.rows, 1, 1) * self.frequencies
        return angles, angles

    def _image_angles(self, token: Tensor | None, given: Tensors) -> tuple[Tensor, Tensor]:
        """Angles of both halves of a head, [k, R, 1, hd / 2]: by row and by column, each frequency twice."""
        offset, grid = first(given["offset"], self.rows), self.grid
        own = token
        if "positions" in given:
            own = of_rows(given["positions"], self.images, self.rows).flatten()
        if own is not None:
            grid = grid.index_select(0, own)
        apart = token is not None or ("positions" in given and self.images > 1)  # each row has tokens of its own
        places = grid.view(-1, self.rows if apart else 1, 2) + offset.view(1, -1, 1)  # [k, R, 2]
        angles = places.view(-1, self.rows, 2, 1) * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles[:, :, :1], angles[:, :, 1:]


class AttnMlp(AttnMlpStep):
    """HART's second half: self-attention and a gated feed-forward, one norm for both; gates where it is modulated."""

    sub_layers = ("sa", "ffn")
    weights = ("norm.weight", "sa.proj.weight", "sa.proj.bias", "ffn.gate_up.weight", "ffn.down.weight")

    def given_shapes(self) -> Shapes:
        return dict.fromkeys(self.given, (self.text_rows, 6, self.config.width))

    def branches(self, attn_mlp: Callable[[], Tensor], given: Tensors, weights: Weights) -> Sequence[SubLayer]:
        w, R = weights, self.rows

        def self_attention(_: Tensor) -> Tensor:
            return gated(F.linear(attn_mlp(), w["sa.proj.weight"], w["sa.proj.bias"]), given, R, 0)

        def feed_forward(tokens: Tensor) -> Tensor:
            h = modulated(rms_norm(tokens, w["norm.weight"]), given, R, 1).to(w["ffn.gate_up.weight"].dtype)
            gate, up = F.linear(h, w["ffn.gate_up.weight"]).chunk(2, dim=-1)
            return gated(F.linear(F.silu(gate) * up, w["ffn.down.weight"]), given, R, 1)

        return self_attention, feed_forward


def modulated(h: Tensor, given: Tensors, rows: int, sub_layer: int) -> Tensor:
    """Normed tokens [L * R, C] with each guidance row's scale and shift for a sub-layer, where layers have any."""
    if "modulation" not in given:
        return h
    mod = first(given["modulation"], rows)
    out = h.view(-1, rows, h.shape[-1]) * (1 + mod[:, 2 + sub_layer]) + mod[:, 4 + sub_layer]
    return out.view(-1, h.shape[-1])


def gated(out: Tensor, given: Tensors, rows: int, sub_layer: int) -> Tensor:
    """A sub-layer's output [L * R, C] with each guidance row's gate, where layers have any; fp32."""
    if "modulation" not in given:
        return out.float()
    return scale_rows(out, first(given["modulation"], rows)[:, sub_layer], rows)


def turned(x: Tensor, angles: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """x [k, R, heads, hd] with the pairs (j, j + hd / 2) turned; angles of both halves, [k, R, 1, hd / 2].

    For image tokens the two differ: that is no rotation, but the model was trained with it (see hart.image_rotary).
    """
    one, other = x.chunk(2, dim=-1)
    by_one, by_other = angles
    halves = (one * by_one.cos() - other * by_one.sin(), other * by_other.cos() + one * by_other.sin())
    return torch.cat([half.to(dtype) for half in halves], dim=-1)
