"""The halves of blocks whose norms and gates are modulated: by a prompt (Infinity) or a class (VAR)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ....families.base import TransformerShape
from ..common.rows import Shapes, Weights, first, modulate, scale_rows
from ..common.weights import affine
from .block_steps import AttnMlpStep, QkvStep, SubLayer, Tensors


class Modulated:
    """What both halves have: modulation [Rt, 6, C] is given, and some layers add an offset of their own to it."""

    config: TransformerShape
    rows: int
    text_rows: int

    def given_shapes(self) -> Shapes:
        return {"modulation": (self.text_rows, 6, self.config.width)}

    def modulation(self, given: Tensors, weights: Weights) -> Tensor:
        """gamma1, gamma2, scale1, scale2, shift1, shift2 of this step's guidance rows [R, 6, C]."""
        mod = first(given["modulation"], self.rows)
        return mod + weights["ada_gss"].view(6, self.config.width) if "ada_gss" in weights else mod


class ModulatedQkv(Modulated, QkvStep):
    """First half: a layer norm with each guidance row's scale and shift."""

    given = ("modulation",)

    def normed(self, x: Tensor, given: Tensors, weights: Weights) -> Tensor:
        mod = self.modulation(given, weights)
        return modulate(x, mod[:, 2], mod[:, 4], self.rows)


class ModulatedAttnMlp(Modulated, AttnMlpStep):
    """Second half: self-attention and feed-forward, both gated."""

    given: tuple[str, ...] = ("modulation",)
    sub_layers: ClassVar[tuple[str, ...]] = ("sa", "ffn")
    weights = affine("sa.proj", "ffn.fc1", "ffn.fc2")

    def branches(self, attn_mlp: Callable[[], Tensor], given: Tensors, weights: Weights) -> Sequence[SubLayer]:
        w, R, mod = weights, self.rows, self.modulation(given, weights)

        def self_attention(_: Tensor) -> Tensor:
            return scale_rows(F.linear(attn_mlp(), w["sa.proj.weight"], w["sa.proj.bias"]), mod[:, 0], R)

        def feed_forward(tokens: Tensor) -> Tensor:
            h = modulate(tokens, mod[:, 3], mod[:, 5], R).to(w["ffn.fc1.weight"].dtype)
            h = F.gelu(F.linear(h, w["ffn.fc1.weight"], w["ffn.fc1.bias"]), approximate="tanh")
            return scale_rows(F.linear(h, w["ffn.fc2.weight"], w["ffn.fc2.bias"]), mod[:, 1], R)

        return self_attention, feed_forward
