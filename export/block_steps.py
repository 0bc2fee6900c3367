"""The two halves of a block as step graphs; between them the keys and values of the scale land in the cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TransformerConfig
from ..rotary import rotary_table
from ..schedule import Size
from .rows import (
    OpenDims,
    Shapes,
    Weights,
    area_corners,
    attention,
    enlarged,
    first,
    modulate,
    placed,
    restore,
    rotate_halves,
    rows_of,
    scale_rows,
    select,
    stand_in,
    tokens_of,
    unit,
)

SMALLER, SIZE, LARGER = (3, 5), (6, 7), (11, 13)  # grids that stand for all others
KEPT, GUIDED, PAST = 23, 13, 61


def _kept(arguments: dict[str, Any], size: Size) -> int:
    """Kept tokens that stand for those of these arguments."""
    if arguments["kept"] == tokens_of(arguments["size"]):
        return tokens_of(size)
    return min(KEPT, tokens_of(size) - 1) if arguments["kept"] > 1 else 1


class Project(nn.Module):
    """First half of a block: (select, gather,) norm, qkv, cosine norm, rotary. Its keys and values go to the cache.

    x [L * R, C], modulation [Rt, 6, C] -> q, keys, values [k, R * heads, hd], and when pruned kept [k * R] (int64).
    Rt is R, or two where guidance has been switched off (R = 1): the conditional row is the first.
    """

    rotary: Tensor
    outputs: tuple[str, ...]
    inputs = ("x", "modulation")
    weights = ("ada_gss", "sa.qkv.weight", "sa.qkv.bias", "sa.q_scale")

    def __init__(
        self, config: TransformerConfig, rows: int, size: Size, kept: int, position_grid: Size, text_rows: int = 0
    ) -> None:
        super().__init__()
        self.config, self.rows, self.size, self.kept = config, rows, size, kept
        self.text_rows = text_rows or rows
        self.prunes = kept < tokens_of(size)
        self.outputs = ("q", "keys", "values", "kept") if self.prunes else ("q", "keys", "values")
        table = torch.from_numpy(rotary_table(size, position_grid, config.head_dim))
        self.register_buffer("rotary", table, persistent=False)  # [2, L, hd / 2]

    def open_dims(self) -> OpenDims:
        kept = "kept" if self.prunes else "tokens"
        own: OpenDims = {"x": {0: ("tokens", self.rows)}, "rotary": {1: ("tokens", 1)}}
        return {**own, **{key: {0: (kept, 1)} for key in ("q", "keys", "values")}, "kept": {0: (kept, self.rows)}}

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        size = stand_in(arguments["size"], SIZE)
        return {**arguments, "size": size, "kept": _kept(arguments, size), "position_grid": LARGER}

    def take_sizes(self, memory: dict[str, Tensor]) -> None:
        self.kept = memory["q"].shape[0]

    def input_shapes(self) -> Shapes:
        c = self.config
        return {"x": (tokens_of(self.size) * self.rows, c.width), "modulation": (self.text_rows, 6, c.width)}

    def output_shapes(self) -> Shapes:
        c, R = self.config, self.rows
        shapes: Shapes = dict.fromkeys(self.outputs[:3], (self.kept, R * c.heads, c.head_dim))
        return shapes | ({"kept": (self.kept * R,)} if self.prunes else {})

    def forward(self, x: Tensor, modulation: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        c, w = self.config, weights
        mod = first(modulation, self.rows) + w["ada_gss"].view(6, c.width)
        cos, sin = self.rotary[0], self.rotary[1]  # [L, hd / 2]
        kept: tuple[Tensor, ...] = ()
        if self.prunes:
            found = select(x, self.rows, self.kept)  # [k, R]
            chosen, token = rows_of(found, self.rows), found.flatten()
            x, kept = x.index_select(0, chosen), (chosen,)
            cos, sin = cos.index_select(0, token), sin.index_select(0, token)  # [k * R, hd / 2]
        h = modulate(x, mod[:, 2], mod[:, 4], self.rows).to(w["sa.qkv.weight"].dtype)
        qkv = F.linear(h, w["sa.qkv.weight"], w["sa.qkv.bias"])
        q, k, v = (t.view(-1, self.rows, c.heads, c.head_dim) for t in qkv.split(c.width, dim=-1))
        lead = (-1, self.rows if self.prunes else 1, 1, c.head_dim // 2)
        cos, sin = cos.view(lead), sin.view(lead)
        q = rotate_halves(unit(q.float()) * w["sa.q_scale"].view(-1, 1), cos, sin, v.dtype)
        k = rotate_halves(unit(k.float()), cos, sin, v.dtype)
        shape = (-1, self.rows * c.heads, c.head_dim)
        return (q.reshape(shape), k.reshape(shape), v.reshape(shape), *kept)


class Attend(nn.Module):
    """Second half of a block: attention over the cache, cross-attention, feed-forward, each restored where pruned.

    x [L * R, C], q [k, R * heads, hd], keys, values [S, R * heads, hd], text_keys, text_values [T, R * heads, hd],
    text_bias [R * heads, 1, T], modulation [R, 6, C]; when pruned kept [k * R] and cached_{sa,ca,ffn} [Lc * R, C]
    -> x_out [L * R, C]; when it fills the cache cache_{sa,ca,ffn} [L * R, C]; when pruned kept_ca, kept_ffn, unless all
    sub-layers share the selection of the first.

    Where guidance has been switched off, R is one and the text's tensors have two rows, and so has the older part of
    the cache: guided_keys, guided_values [S', 2 * heads, hd] besides. The conditional row is the first.
    """

    corners: Tensor

    attentions = 2  # over the cache, and to the text
    attention = staticmethod(attention)  # programs.py puts another form in its place
    weights = (
        "ada_gss",
        "sa.proj.weight",
        "sa.proj.bias",
        "ca_norm.weight",
        "ca_norm.bias",
        "ca.mat_q.weight",
        "ca.mat_q.bias",
        "ca.proj.weight",
        "ca.proj.bias",
        "ffn.fc1.weight",
        "ffn.fc1.bias",
        "ffn.fc2.weight",
        "ffn.fc2.bias",
    )

    def __init__(
        self,
        config: TransformerConfig,
        rows: int,
        size: Size,
        kept: int,
        past: int,
        text_length: int,
        cached_size: Size | None,
        fills: bool,
        text_rows: int = 0,
        cached_rows: int = 0,
        guided_past: int = 0,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.text_rows, self.cached_rows = text_rows or rows, cached_rows or rows
        self.guided_past = guided_past if self.text_rows > rows else 0
        self.config, self.rows, self.size, self.kept, self.fills = config, rows, size, kept, fills
        self.past, self.text_length, self.cached_size = past, text_length, cached_size
        self.prunes, self.shared = kept < tokens_of(size), shared
        self.inputs: tuple[str, ...] = (
            "x",
            "q",
            "keys",
            "values",
            "text_keys",
            "text_values",
            "text_bias",
            "modulation",
        )
        self.outputs: tuple[str, ...] = ("x_out",)
        if fills:
            self.outputs += ("cache_sa", "cache_ca", "cache_ffn")
        if self.prunes:
            assert cached_size is not None
            self.inputs += ("kept", "cached_sa", "cached_ca", "cached_ffn")
            self.outputs += () if shared else ("kept_ca", "kept_ffn")
            corners = area_corners(cached_size, size, rows, self.cached_rows)
            self.register_buffer("corners", corners, persistent=False)
        if self.guided_past:
            self.inputs += ("guided_keys", "guided_values")

    def open_dims(self) -> OpenDims:
        kept, R = "kept" if self.prunes else "tokens", self.rows
        if self.shared:  # torch 2.13 cannot compile this form with sizes left open
            return {}
        return {
            "corners": {1: ("tokens", R)},
            "q": {0: (kept, 1)},
            **{key: {0: ("tokens", R)} for key in ("x", "x_out", "cache_sa", "cache_ca", "cache_ffn")},
            **{key: {0: (kept, R)} for key in ("kept", "kept_ca", "kept_ffn")},
            **{key: {0: ("keys", 1)} for key in ("keys", "values")},
            **{key: {0: ("guided", 1)} for key in ("guided_keys", "guided_values")},
            **{key: {0: ("cached", self.cached_rows)} for key in ("cached_sa", "cached_ca", "cached_ffn")},
        }

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments.get("shared"):
            return arguments
        size, cached = stand_in(arguments["size"], SIZE), arguments["cached_size"]
        kept, guided = _kept(arguments, size), arguments.get("guided_past", 0)
        guided = GUIDED if guided > 1 else guided
        alone = kept == 1 and arguments["past"] == arguments.get("guided_past", 0)  # one key, the scale's own
        sizes = {"size": size, "kept": kept, "past": guided + (0 if alone else PAST), "guided_past": guided}
        return {**arguments, **sizes, "cached_size": cached and stand_in(cached, SMALLER)}

    def take_sizes(self, memory: dict[str, Tensor]) -> None:
        """All are in the shapes of the inputs."""

    def input_shapes(self) -> Shapes:
        c, R, L, text_heads = self.config, self.rows, tokens_of(self.size), self.text_rows * self.config.heads
        kv = (self.past - self.guided_past + self.kept, R * c.heads, c.head_dim)
        text_kv = (self.text_length, text_heads, c.head_dim)
        shapes: Shapes = {
            "x": (L * R, c.width),
            "q": (self.kept, R * c.heads, c.head_dim),
            **dict.fromkeys(("keys", "values"), kv),
            **dict.fromkeys(("text_keys", "text_values"), text_kv),
            "text_bias": (text_heads, 1, self.text_length),
            "modulation": (self.text_rows, 6, c.width),
        }
        if self.prunes:
            assert self.cached_size is not None
            cached = (tokens_of(self.cached_size) * self.cached_rows, c.width)
            shapes |= {"kept": (self.kept * R,), **dict.fromkeys(("cached_sa", "cached_ca", "cached_ffn"), cached)}
        if self.guided_past:
            shapes |= dict.fromkeys(("guided_keys", "guided_values"), (self.guided_past, text_heads, c.head_dim))
        return shapes

    def output_shapes(self) -> Shapes:
        whole, kept = (tokens_of(self.size) * self.rows, self.config.width), (self.kept * self.rows,)
        return {name: kept if name.startswith("kept") else whole for name in self.outputs}

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        text_keys: Tensor,
        text_values: Tensor,
        text_bias: Tensor,
        modulation: Tensor,
        *further: Tensor,
        weights: Weights,
    ) -> tuple[Tensor, ...]:
        w, R, C = weights, self.rows, self.config.width
        mod = first(modulation, R) + w["ada_gss"].view(6, C)
        own = R * self.config.heads  # of the text's heads: those of this step's rows
        text_keys, text_values, text_bias = first(text_keys, own, 1), first(text_values, own, 1), first(text_bias, own)
        pruned = further[:4] if self.prunes else ()
        if self.guided_past:
            guided_keys, guided_values = further[-2:]
            keys = torch.cat((first(guided_keys, own, 1), keys))
            values = torch.cat((first(guided_values, own, 1), values))

        def self_attention(_: Tensor) -> Tensor:
            out = F.linear(self.attention(q, keys, values, None, C), w["sa.proj.weight"], w["sa.proj.bias"])
            return scale_rows(out, mod[:, 0], R)

        def cross_attention(tokens: Tensor) -> Tensor:
            h = F.layer_norm(tokens, tokens.shape[-1:], w["ca_norm.weight"], w["ca_norm.bias"], 1e-6)
            query = F.linear(h.to(w["ca.mat_q.weight"].dtype), w["ca.mat_q.weight"], w["ca.mat_q.bias"])
            query = (query * self.config.head_dim**-0.5).view(-1, R * self.config.heads, self.config.head_dim)
            out = self.attention(query, text_keys, text_values, text_bias, C)
            return F.linear(out, w["ca.proj.weight"], w["ca.proj.bias"]).float()

        def feed_forward(tokens: Tensor) -> Tensor:
            h = modulate(tokens, mod[:, 3], mod[:, 5], R).to(w["ffn.fc1.weight"].dtype)
            h = F.gelu(F.linear(h, w["ffn.fc1.weight"], w["ffn.fc1.bias"]), approximate="tanh")
            return scale_rows(F.linear(h, w["ffn.fc2.weight"], w["ffn.fc2.bias"]), mod[:, 1], R)

        sub_layers = (self_attention, cross_attention, feed_forward)
        if self.prunes and self.shared:
            kept, *cached = pruned
            tokens = x.index_select(0, kept)
            for added in sub_layers:
                tokens = tokens + added(tokens)
            rest = x + sum(enlarged(values, self.corners) for values in cached)
            return (placed(tokens, kept, rest),)
        filled, chosen = [], []
        for i, sub_layer in enumerate(sub_layers):
            if self.prunes:
                # The self-attention's own selection was made in the first half, where its queries come from.
                kept = pruned[0] if i == 0 else rows_of(select(x, R, q.shape[0]), R)
                out = restore(sub_layer(x.index_select(0, kept)), kept, pruned[1 + i], self.corners)
                chosen.append(kept)
            else:
                out = sub_layer(x)
            filled.append(out.to(q.dtype))  # the token cache is kept in the precision of keys and values
            x = x + out
        return (x, *(filled if self.fills else ()), *chosen[1:])
