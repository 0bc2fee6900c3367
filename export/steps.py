"""The step graphs: what is exported, one torch module each, weights as inputs, every shape static.

Layout: activations are rows [L * R, C], token outermost, where R counts guidance rows; keys and values are
[S, R * heads, head_dim]. So the prefix of a cache is contiguous, and a scale's keys land behind it without a copy.
The residual stream and the selection are fp32 whatever the weights' dtype.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import TransformerConfig
from ..rotary import rotary_table
from ..schedule import Size
from .infinity import layer_norm
from .resize import area_ends, bilinear_matrix

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


class Condition(nn.Module):
    """Text features -> first tokens, cross-attention source, modulation of the blocks and of the head.

    cond, uncond [T, Ct] (uncond absent without guidance), mask [R, T] (1 = a token)
    -> x [R, C], text [T * R, C], modulation [R, 6, C], head_modulation [R, 2, C], text_bias [R * heads, 1, T]
    """

    outputs = ("x", "text", "modulation", "head_modulation", "text_bias")
    weights = (
        "text_norm.weight",
        "text_proj_for_sos.ca.mat_q",
        "text_proj_for_sos.ca.mat_kv.weight",
        "text_proj_for_sos.ca.kv_bias",
        "text_proj_for_sos.ca.proj.weight",
        "text_proj_for_sos.ca.proj.bias",
        "text_proj_for_ca.0.weight",
        "text_proj_for_ca.0.bias",
        "text_proj_for_ca.2.weight",
        "text_proj_for_ca.2.bias",
        "pos_start",
        "lvl_embed.weight",
        "shared_ada_lin.1.weight",
        "shared_ada_lin.1.bias",
        "head_nm.ada_lin.1.weight",
        "head_nm.ada_lin.1.bias",
    )

    def __init__(self, config: TransformerConfig, rows: int, text_length: int) -> None:
        super().__init__()
        self.config, self.rows = config, rows
        self.text_length = text_length
        self.inputs = ("cond", "uncond", "mask") if rows == 2 else ("cond", "mask")

    def input_shapes(self) -> Shapes:
        text = (self.text_length, self.config.text_width)
        return {**dict.fromkeys(self.inputs[:-1], text), "mask": (self.rows, self.text_length)}

    def forward(self, *tensors: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        c, w = self.config, weights
        *features, mask = tensors
        text = torch.stack(features, dim=1).float()  # [T, R, Ct]
        text = text * torch.rsqrt(text.square().mean(-1, keepdim=True) + 1e-6) * w["text_norm.weight"]
        flat = text.flatten(0, 1).to(w["text_proj_for_ca.0.weight"].dtype)  # [T * R, Ct]
        bias = (mask.float() - 1.0) * 1e30  # [R, T]: 0 for a token, hugely negative for padding
        sos = self._pool(flat, bias, w)  # [R, C]
        hidden = F.gelu(
            F.linear(flat, w["text_proj_for_ca.0.weight"], w["text_proj_for_ca.0.bias"]), approximate="tanh"
        )
        source = F.linear(hidden, w["text_proj_for_ca.2.weight"], w["text_proj_for_ca.2.bias"])
        active = F.silu(sos)
        modulation = F.linear(active, w["shared_ada_lin.1.weight"], w["shared_ada_lin.1.bias"]).float()
        head = F.linear(active, w["head_nm.ada_lin.1.weight"], w["head_nm.ada_lin.1.bias"]).float()
        x = sos.float() + w["pos_start"].flatten().float() + w["lvl_embed.weight"][0].float()
        text_bias = bias[:, None, None, :].expand(-1, c.heads, -1, -1).flatten(0, 1)
        return x, source, modulation.view(-1, 6, c.width), head.view(-1, 2, c.width), text_bias.contiguous()

    def _pool(self, flat: Tensor, bias: Tensor, w: Weights) -> Tensor:
        """flat [T * R, Ct], bias [R, T] -> [R, C]: one learned query over the text."""
        c, prefix = self.config, "text_proj_for_sos.ca."
        heads, size = c.pool_heads, c.width // c.pool_heads
        kv = F.linear(flat, w[prefix + "mat_kv.weight"], w[prefix + "kv_bias"])
        kv = kv.view(-1, self.rows, 2, heads, size).permute(2, 1, 3, 0, 4)  # [2, R, heads, T, size]
        query = w[prefix + "mat_q"].view(1, heads, 1, size) * size**-0.5
        scores = (query * kv[0]).sum(-1).float() + bias[:, None, :]  # [R, heads, T]
        share = torch.softmax(scores, dim=-1).unsqueeze(-1).to(kv.dtype)
        pooled = (share * kv[1]).sum(2).flatten(1)
        return F.linear(pooled, w[prefix + "proj.weight"], w[prefix + "proj.bias"])


class TextKV(nn.Module):
    """One layer's cross-attention keys and values, once per image: text [T * R, C] -> k, v [T, R * heads, hd]."""

    inputs = ("text",)
    outputs = ("text_keys", "text_values")
    weights = ("ca.mat_kv.weight", "ca.kv_bias")

    def __init__(self, config: TransformerConfig, rows: int, text_length: int) -> None:
        super().__init__()
        self.config, self.rows, self.text_length = config, rows, text_length

    def input_shapes(self) -> Shapes:
        return {"text": (self.text_length * self.rows, self.config.width)}

    def forward(self, text: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        c = self.config
        k, v = F.linear(text, weights["ca.mat_kv.weight"], weights["ca.kv_bias"]).split(c.width, dim=-1)
        shape = (-1, self.rows * c.heads, c.head_dim)
        return k.reshape(shape), v.reshape(shape)


class Project(nn.Module):
    """First half of a block: (select, gather,) norm, qkv, cosine norm, rotary. Its keys and values go to the cache.

    x [L * R, C], modulation [R, 6, C] -> q, keys, values [k, R * heads, hd], and when pruned kept [k * R] (int64).
    """

    rotary: Tensor
    outputs: tuple[str, ...]
    inputs = ("x", "modulation")
    weights = ("ada_gss", "sa.qkv.weight", "sa.qkv.bias", "sa.q_scale")

    def __init__(self, config: TransformerConfig, rows: int, size: Size, kept: int, position_grid: Size) -> None:
        super().__init__()
        self.config, self.rows, self.size, self.kept = config, rows, size, kept
        self.prunes = kept < tokens_of(size)
        self.outputs = ("q", "keys", "values", "kept") if self.prunes else ("q", "keys", "values")
        table = torch.from_numpy(rotary_table(size, position_grid, config.head_dim))
        self.register_buffer("rotary", table, persistent=False)  # [2, L, hd / 2]

    def input_shapes(self) -> Shapes:
        c, R = self.config, self.rows
        return {"x": (tokens_of(self.size) * R, c.width), "modulation": (R, 6, c.width)}

    def forward(self, x: Tensor, modulation: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        c, w = self.config, weights
        mod = modulation + w["ada_gss"].view(6, c.width)
        cos, sin = self.rotary[0], self.rotary[1]  # [L, hd / 2]
        kept: tuple[Tensor, ...] = ()
        if self.prunes:
            token = select(x, self.rows, self.kept).flatten()  # [k * R]
            chosen = rows_of(token, self.rows)
            x, kept = x.index_select(0, chosen), (chosen,)
            cos, sin = cos.index_select(0, token), sin.index_select(0, token)  # [k * R, hd / 2]
        h = modulate(x, mod[:, 2], mod[:, 4], self.rows).to(w["sa.qkv.weight"].dtype)
        qkv = F.linear(h, w["sa.qkv.weight"], w["sa.qkv.bias"])
        q, k, v = (t.view(-1, self.rows, c.heads, c.head_dim) for t in qkv.split(c.width, dim=-1))
        lead = (-1, self.rows if self.prunes else 1, 1, c.head_dim // 2)
        cos, sin = cos.view(lead), sin.view(lead)
        q = rotate_halves(unit(q.float()) * w["sa.q_scale"].view(-1, 1), cos, sin)
        k = rotate_halves(unit(k.float()), cos, sin)
        shape = (-1, self.rows * c.heads, c.head_dim)
        return (q.to(v.dtype).reshape(shape), k.to(v.dtype).reshape(shape), v.reshape(shape), *kept)


class Attend(nn.Module):
    """Second half of a block: attention over the cache, cross-attention, feed-forward, each restored where pruned.

    x [L * R, C], q [k, R * heads, hd], keys, values [S, R * heads, hd], text_keys, text_values [T, R * heads, hd],
    text_bias [R * heads, 1, T], modulation [R, 6, C]; when pruned kept [k * R] and cached_{sa,ca,ffn} [Lc * R, C]
    -> x_out [L * R, C]; when it fills the cache cache_{sa,ca,ffn} [L * R, C]; when pruned kept_ca, kept_ffn.
    """

    corners: Tensor

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
    ) -> None:
        super().__init__()
        self.config, self.rows, self.size, self.kept, self.fills = config, rows, size, kept, fills
        self.past, self.text_length, self.cached_size = past, text_length, cached_size
        self.prunes = kept < tokens_of(size)
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
            self.outputs += ("kept_ca", "kept_ffn")
            self.register_buffer("corners", area_corners(cached_size, size, rows), persistent=False)

    def input_shapes(self) -> Shapes:
        c, R, L = self.config, self.rows, tokens_of(self.size)
        kv = (self.past + self.kept, R * c.heads, c.head_dim)
        text_kv = (self.text_length, R * c.heads, c.head_dim)
        shapes: Shapes = {
            "x": (L * R, c.width),
            "q": (self.kept, R * c.heads, c.head_dim),
            **dict.fromkeys(("keys", "values"), kv),
            **dict.fromkeys(("text_keys", "text_values"), text_kv),
            "text_bias": (R * c.heads, 1, self.text_length),
            "modulation": (R, 6, c.width),
        }
        if self.prunes:
            assert self.cached_size is not None
            cached = (tokens_of(self.cached_size) * R, c.width)
            shapes |= {"kept": (self.kept * R,), **dict.fromkeys(("cached_sa", "cached_ca", "cached_ffn"), cached)}
        return shapes

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
        *pruned: Tensor,
        weights: Weights,
    ) -> tuple[Tensor, ...]:
        w, R, C = weights, self.rows, self.config.width
        mod = modulation + w["ada_gss"].view(6, C)

        def self_attention(_: Tensor) -> Tensor:
            out = F.linear(attention(q, keys, values, None, C), w["sa.proj.weight"], w["sa.proj.bias"])
            return scale_rows(out, mod[:, 0], R)

        def cross_attention(tokens: Tensor) -> Tensor:
            h = F.layer_norm(tokens, tokens.shape[-1:], w["ca_norm.weight"].float(), w["ca_norm.bias"].float(), 1e-6)
            query = F.linear(h.to(w["ca.mat_q.weight"].dtype), w["ca.mat_q.weight"], w["ca.mat_q.bias"])
            query = (query * self.config.head_dim**-0.5).view(-1, R * self.config.heads, self.config.head_dim)
            out = attention(query, text_keys, text_values, text_bias, C)
            return F.linear(out, w["ca.proj.weight"], w["ca.proj.bias"]).float()

        def feed_forward(tokens: Tensor) -> Tensor:
            h = modulate(tokens, mod[:, 3], mod[:, 5], R).to(w["ffn.fc1.weight"].dtype)
            h = F.gelu(F.linear(h, w["ffn.fc1.weight"], w["ffn.fc1.bias"]), approximate="tanh")
            return scale_rows(F.linear(h, w["ffn.fc2.weight"], w["ffn.fc2.bias"]), mod[:, 1], R)

        filled, chosen = [], []
        for i, sub_layer in enumerate((self_attention, cross_attention, feed_forward)):
            if self.prunes:
                # The self-attention's own selection was made in the first half, where its queries come from.
                kept = pruned[0] if i == 0 else rows_of(select(x, R, self.kept).flatten(), R)
                out = restore(sub_layer(x.index_select(0, kept)), kept, pruned[1 + i], self.corners)
                chosen.append(kept)
            else:
                out = sub_layer(x)
            filled.append(out)
            x = x + out
        return (x, *(filled if self.fills else ()), *chosen[1:])


class Bridge(nn.Module):
    """From the last block of one scale to the first of the next: head, guidance, sampling, codes, sum, embedding.

    x [L * R, C], head_modulation [R, 2, C], noise [L, channels], guidance, tau, cut (each [1]; cut = 1 - top_p),
    summed [1, bits, H, W] -> logits [L, 2 * channels], summed_out, and but for the last scale x_next [L' * R, C].
    """

    enlarge_0: Tensor  # bilinear matrices [final, own] and [next, final], per axis
    enlarge_1: Tensor
    shrink_0: Tensor
    shrink_1: Tensor
    weights_last = ("head.weight", "head.bias")
    weights_next = (*weights_last, "word_embed.weight", "word_embed.bias", "lvl_embed.weight")

    def __init__(
        self,
        config: TransformerConfig,
        rows: int,
        size: Size,
        final: Size,
        next_size: Size | None,
        next_index: int | None,
    ) -> None:
        super().__init__()
        self.config, self.rows, self.size, self.final = config, rows, size, final
        self.next_size, self.next_index = next_size, next_index
        self.inputs: tuple[str, ...] = ("x", "head_modulation", "noise", "tau", "cut", "summed")
        if rows == 2:
            self.inputs += ("guidance",)
        self.outputs = ("logits", "summed_out") + (() if next_size is None else ("x_next",))
        self.weights = self.weights_last if next_size is None else self.weights_next
        p = config.patch
        self._resize("enlarge", (size[0] * p, size[1] * p), (final[0] * p, final[1] * p))
        if next_size is not None:
            self._resize("shrink", (final[0] * p, final[1] * p), (next_size[0] * p, next_size[1] * p))

    def input_shapes(self) -> Shapes:
        c, R, L, p = self.config, self.rows, tokens_of(self.size), self.config.patch
        shapes: Shapes = {
            "x": (L * R, c.width),
            "head_modulation": (R, 2, c.width),
            "noise": (L, c.code_channels),
            "tau": (1,),
            "cut": (1,),
            "summed": (1, c.bits, self.final[0] * p, self.final[1] * p),
        }
        return shapes | ({"guidance": (1,)} if R == 2 else {})

    def _resize(self, name: str, source: Size, target: Size) -> None:
        for axis in (0, 1):
            matrix = torch.from_numpy(bilinear_matrix(source[axis], target[axis]))
            self.register_buffer(f"{name}_{axis}", matrix, persistent=False)

    def forward(
        self,
        x: Tensor,
        head_modulation: Tensor,
        noise: Tensor,
        tau: Tensor,
        cut: Tensor,
        summed: Tensor,
        *guidance: Tensor,
        weights: Weights,
    ) -> tuple[Tensor, ...]:
        w, p = weights, self.config.patch
        h = modulate(x, head_modulation[:, 0], head_modulation[:, 1], self.rows).to(w["head.weight"].dtype)
        logits = (
            F.linear(h, w["head.weight"], w["head.bias"]).float().view(-1, self.rows, 2 * self.config.code_channels)
        )
        logits = logits / tau
        logits = guidance[0] * logits[:, 0] + (1 - guidance[0]) * logits[:, 1] if guidance else logits[:, 0]
        codes = self._sample(logits, noise, cut)  # [L, channels]
        grid = codes.transpose(0, 1).reshape(1, -1, *self.size)
        if p > 1:
            grid = F.pixel_shuffle(grid, p)
        if self.enlarge_0.shape[0] != self.enlarge_0.shape[1] or self.enlarge_1.shape[0] != self.enlarge_1.shape[1]:
            grid = self.enlarge_0 @ grid @ self.enlarge_1.t()
        summed = summed + grid
        if self.next_size is None:
            return logits, summed
        following = self.shrink_0 @ summed @ self.shrink_1.t()
        if p > 1:
            following = F.pixel_unshuffle(following, p)
        tokens = following.flatten(2).squeeze(0).transpose(0, 1).to(w["word_embed.weight"].dtype)  # [L', channels]
        embedded = F.linear(tokens, w["word_embed.weight"], w["word_embed.bias"]).float()
        embedded = embedded + w["lvl_embed.weight"][self.next_index].float()
        x_next = embedded.unsqueeze(1).expand(-1, self.rows, -1).reshape(-1, self.config.width)
        return logits, summed, x_next

    def _sample(self, logits: Tensor, noise: Tensor, cut: Tensor) -> Tensor:
        """A bit is one where noise < P(one); a value of probability <= cut goes. Bit b -> (2b - 1) / sqrt(bits)."""
        pair = logits.view(-1, self.config.code_channels, 2)
        one = torch.sigmoid(pair[..., 1] - pair[..., 0])
        one = torch.where(one <= cut, torch.zeros_like(one), torch.where(1 - one <= cut, torch.ones_like(one), one))
        size = self.config.bits**-0.5
        return torch.where(noise < one, size, -size)


def tokens_of(size: Size) -> int:
    return size[0] * size[1]


def select(x: Tensor, rows: int, count: int) -> Tensor:
    """Token indices [count, R] of each guidance row's pivotal tokens in x [L * R, C] (see pruning.select)."""
    grid = x.view(-1, rows, x.shape[-1])
    score = (grid - grid.mean(dim=0, keepdim=True)).square().sum(-1)  # [L, R]
    return torch.topk(score, count, dim=0).indices


def rows_of(token: Tensor, rows: int) -> Tensor:
    """Token indices [k * R], guidance rows innermost -> indices into activations [L * R, C]."""
    return token * rows + torch.arange(rows).repeat(token.shape[0] // rows)


def restore(fresh: Tensor, kept: Tensor, cached: Tensor, corners: Tensor) -> Tensor:
    """fresh [k * R, C] at the rows `kept`, elsewhere the area-enlarged cache: four gathers and a mean.

    An inverse index with a gather fuses; a scatter would write the whole map twice.
    """
    inverse = torch.full((corners.shape[1],), -1, dtype=torch.int64).index_put((kept,), torch.arange(kept.shape[0]))
    enlarged = sum(cached.index_select(0, corner) for corner in corners) * 0.25
    return torch.where((inverse >= 0).unsqueeze(-1), fresh.index_select(0, inverse.clamp(min=0)), enlarged)


def area_corners(source: Size, target: Size, rows: int) -> Tensor:
    """Rows of the cached map that each row of the target averages: [4, L * R], exact for enlarging."""
    (top, bottom), (left, right) = (area_ends(s, t) for s, t in zip(source, target, strict=True))
    token = [r[:, None] * source[1] + c[None, :] for r in (top, bottom) for c in (left, right)]
    index = np.stack([t.reshape(-1, 1) * rows + np.arange(rows) for t in token])
    return torch.from_numpy(index.reshape(4, -1))


def attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """q [k, R * heads, hd] over keys, values [S, R * heads, hd] -> [k * R, C]; the softmax in fp32.

    Written out in rank 3: this form becomes one fused kernel, the operator of rank 4 does not in this layout.
    """
    scores = (q.transpose(0, 1) @ keys.permute(1, 2, 0)).float()  # [R * heads, k, S]
    if bias is not None:
        scores = scores + bias
    out = torch.softmax(scores, dim=-1).to(values.dtype) @ values.transpose(0, 1)  # [R * heads, k, hd]
    return out.transpose(0, 1).reshape(-1, width)


def modulate(x: Tensor, scale: Tensor, shift: Tensor, rows: int) -> Tensor:
    """Layer norm of x [L * R, C] with each guidance row's scale and shift [R, C]."""
    h = layer_norm(x).view(-1, rows, x.shape[-1])
    return (h * (1 + scale) + shift).view(-1, x.shape[-1])


def scale_rows(x: Tensor, gamma: Tensor, rows: int) -> Tensor:
    """x [L * R, C] times each guidance row's gate [R, C], in fp32."""
    return (x.float().view(-1, rows, x.shape[-1]) * gamma).view(-1, x.shape[-1])


def unit(x: Tensor) -> Tensor:
    """L2-normalised along the last axis, eps 1e-12."""
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary on pairs (j, j + hd / 2): the prepared qkv weight holds its rows in that order (weights.py)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
