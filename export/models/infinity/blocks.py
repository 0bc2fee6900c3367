"""Infinity's blocks as step graphs: self-attention, cross-attention and feed-forward, all modulated by the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.rotary import rotary_table
from ....core.schedule import Size
from ....families.infinity import TransformerConfig
from ..common.rows import OpenDims, Shapes, Weights, first, rotate_halves, unit
from ..common.weights import affine
from ..transformer.block_steps import LARGER, SubLayer, Tensors
from ..transformer.modulated_steps import ModulatedAttnMlp, ModulatedQkv
from ..transformer.pruning import CROSS_ATTENTION


class Qkv(ModulatedQkv):
    """Infinity's first half: modulated layer norm, cosine attention, 2-D rotary."""

    rotary: Tensor
    weights = ("ada_gss", "sa.qkv.weight", "sa.qkv.bias", "sa.q_scale")

    def __init__(
        self, config: TransformerConfig, rows: int, size: Size, kept: int, rope_grid: Size, text_rows: int = 0
    ) -> None:
        super().__init__(config, rows, size, kept, text_rows)
        table = torch.from_numpy(rotary_table(size, rope_grid, config.head_dim))
        self.register_buffer("rotary", table, persistent=False)  # [2, L, hd / 2]

    def open_dims(self) -> OpenDims:
        return {"rotary": {1: ("tokens", 1)}, **super().open_dims()}

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        return {**super().stand_in(arguments), "rope_grid": LARGER}

    def positioned(
        self, q: Tensor, k: Tensor, token: Tensor | None, given: Tensors, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary[0], self.rotary[1]  # [L, hd / 2]
        if token is not None:
            cos, sin = cos.index_select(0, token), sin.index_select(0, token)  # [k * R, hd / 2]
        lead = (-1, 1 if token is None else self.rows, 1, self.config.head_dim // 2)
        cos, sin = cos.view(lead), sin.view(lead)
        turned = rotate_halves(unit(q.float()) * weights["sa.q_scale"].view(-1, 1), cos, sin, q.dtype)
        return turned, rotate_halves(unit(k.float()), cos, sin, k.dtype)


class AttnMlp(ModulatedAttnMlp):
    """Infinity's second half: self-attention, cross-attention, feed-forward.

    text_keys, text_values [T, Rt * heads, hd], text_bias [Rt * heads, 1, T], modulation [Rt, 6, C] are given; Rt is R,
    or two where guidance has been switched off.
    """

    given = ("text_keys", "text_values", "text_bias", "modulation")
    sub_layers = ("sa", CROSS_ATTENTION, "ffn")
    attentions = 2  # over the cache, and to the text
    weights = ("ada_gss", *affine("sa.proj", "ca_norm", "ca.mat_q", "ca.proj", "ffn.fc1", "ffn.fc2"))

    def __init__(
        self,
        config: TransformerConfig,
        rows: int,
        size: Size,
        kept: int,
        past: int,
        text_length: int,
        *further: Any,
        **named: Any,
    ) -> None:
        """further, named: the arguments of AttnMlpStep from `cached_size` on."""
        reads_text = CROSS_ATTENTION not in named.get("restored", ())
        named |= {} if reads_text else {"given": super().given}
        super().__init__(config, rows, size, kept, past, *further, **named)
        self.text_length = text_length
        if not reads_text:
            self.attentions, self.weights = 1, tuple(name for name in self.weights if not name.startswith("ca"))

    def given_shapes(self) -> Shapes:
        c, text_heads = self.config, self.text_rows * self.config.heads
        return {
            **dict.fromkeys(("text_keys", "text_values"), (self.text_length, text_heads, c.head_dim)),
            "text_bias": (text_heads, 1, self.text_length),
            **super().given_shapes(),
        }

    def branches(self, attn_mlp: Callable[[], Tensor], given: Tensors, weights: Weights) -> Sequence[SubLayer]:
        w, R, c = weights, self.rows, self.config
        self_attention, feed_forward = super().branches(attn_mlp, given, weights)

        def cross_attention(tokens: Tensor) -> Tensor:
            own = R * c.heads  # of the text's heads: those of this step's rows
            text_keys, text_values = first(given["text_keys"], own, 1), first(given["text_values"], own, 1)
            text_bias = first(given["text_bias"], own)
            h = F.layer_norm(tokens, tokens.shape[-1:], w["ca_norm.weight"], w["ca_norm.bias"], 1e-6)
            query = F.linear(h.to(w["ca.mat_q.weight"].dtype), w["ca.mat_q.weight"], w["ca.mat_q.bias"])
            query = (query * c.head_dim**-0.5).view(-1, R * c.heads, c.head_dim)
            out = self.attention(query, text_keys, text_values, text_bias, c.width)
            return F.linear(out, w["ca.proj.weight"], w["ca.proj.bias"]).float()

        return self_attention, cross_attention, feed_forward
