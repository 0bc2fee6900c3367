"""Arithmetic on activations laid out as rows: [L * R, C], token outermost, where R counts guidance rows.

Keys and values are [S, R * heads, head_dim]. So the prefix of a cache is contiguous, and a scale's keys land
behind it without a copy. Selection and residual stream are fp32 whatever the weights' dtype.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..precision import Precision
from ..resize import area_ends
from ..schedule import Size
from .infinity import layer_norm

LONGEST_TOPK = 3840  # TensorRT's limit

# Activations at the border of a graph that are neither fp32 nor of the compute precision, and those that are.
INTEGERS = frozenset({"kept", "kept_ca", "kept_ffn", "ids", "attention_mask", "labels", "top_k", "codes", "positions"})
COMPUTED = frozenset(
    {"q", "keys", "values", "guided_keys", "guided_values", "text", "text_keys", "text_values"}
    | {f"{end}_{sub_layer}" for end in ("cache", "cached") for sub_layer in ("sa", "ca", "ffn")}
    | {"stripe", "inner_stripe", "residual", "stripe_out", "inner_stripe_out"}
)

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
ANY = ("", 1)  # a size that nothing is said of
OpenDims = dict[str, dict[int, tuple[str, int]]]  # tensor -> dimension -> (name of a size, how many times that size)


def border_dtype(name: str, precision: Precision) -> str:
    """Element type of an activation at the border of a graph."""
    return "int64" if name in INTEGERS else precision.compute if name in COMPUTED else "float32"


def tokens_of(size: Size) -> int:
    return size[0] * size[1]


def stand_in(size: Size, other: Size) -> Size:
    """Another grid in place of one, with one row or column where it has one (see graphs.OpenModule)."""
    return (other[0] if size[0] > 1 else 1, other[1] if size[1] > 1 else 1)


def select(x: Tensor, rows: int, count: int) -> Tensor:
    """Token indices [count, R] of each guidance row's pivotal tokens in x [L * R, C] (see pruning.select)."""
    grid = x.view(-1, rows, x.shape[-1])
    score = (grid - grid.mean(dim=0, keepdim=True)).square().sum(-1)  # [L, R]
    return largest(score, count)


def largest(score: Tensor, count: int) -> Tensor:
    """Indices [count, R] of the largest of score [L, R], none negative; in turns where the compilers' limit asks."""
    if not isinstance(count, int) or count <= LONGEST_TOPK:  # a size left open is none of those compilers'
        return torch.topk(score, count, dim=0).indices
    first = torch.topk(score, LONGEST_TOPK, dim=0).indices
    rest = score.scatter(0, first, -1.0)  # out of the running: a squared distance is never negative
    return torch.cat((first, largest(rest, count - LONGEST_TOPK)))


def rows_of(token: Tensor, rows: int) -> Tensor:
    """Token indices [k, R] -> indices [k * R] into activations [L * R, C]."""
    return (token * rows + torch.arange(rows)).flatten()


def restore(fresh: Tensor, kept: Tensor, cached: Tensor, corners: Tensor) -> Tensor:
    """fresh [k * R, C] at the rows `kept`, elsewhere the area-enlarged cache: four gathers and a mean, in fp32.

    An inverse index with a gather fuses; a scatter would write the whole map twice.
    """
    return placed(fresh, kept, enlarged(cached, corners))


def enlarged(cached: Tensor, corners: Tensor) -> Tensor:
    """The cached map enlarged by area [L * R, C] (fp32), given which of its rows each row averages [4, L * R]."""
    return sum(cached.index_select(0, corner).float() for corner in corners) * 0.25  # type: ignore[return-value]


def placed(fresh: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    """rest [L * R, C], and fresh [k * R, C] in its place at the rows `kept`."""
    inverse = torch.full((rest.shape[0],), -1, dtype=torch.int64).index_put((kept,), torch.arange(kept.shape[0]))
    return torch.where((inverse >= 0).unsqueeze(-1), fresh.index_select(0, inverse.clamp(min=0)), rest)


def first(x: Tensor, count: int, dim: int = 0) -> Tensor:
    """The first `count` along a dimension, where the conditional row lies; x itself where that is all of it."""
    return x if x.shape[dim] == count else x.narrow(dim, 0, count)


def area_corners(source: Size, target: Size, rows: int, source_rows: int) -> Tensor:
    """Rows of the cached map, of `source_rows` guidance rows, that each row of the target averages: [4, L * R].

    Exact for enlarging.
    """
    (top, bottom), (left, right) = (area_ends(s, t) for s, t in zip(source, target, strict=True))
    token = [r[:, None] * source[1] + c[None, :] for r in (top, bottom) for c in (left, right)]
    index = np.stack([t.reshape(-1, 1) * source_rows + np.arange(rows) for t in token])
    return torch.from_numpy(index.reshape(4, -1))


def attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """q [k, R * heads, hd] over keys, values [S, R * heads, hd] -> [k * R, C]; the softmax in fp32.

    Written out in rank 3: this form becomes one fused kernel, the operator of rank 4 does not in this layout.
    """
    if keys.shape[0] == 1:  # compilers fuse no softmax over one key; over the same key twice they do, to the same end
        keys, values = keys.repeat(2, 1, 1), values.repeat(2, 1, 1)
    scores = (q.transpose(0, 1) @ keys.permute(1, 2, 0)).float()  # [R * heads, k, S]
    if bias is not None:
        scores = scores + bias
    out = torch.softmax(scores, dim=-1).to(values.dtype) @ values.transpose(0, 1)  # [R * heads, k, hd]
    return out.transpose(0, 1).reshape(-1, width)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm along the last axis, eps 1e-6."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


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


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotary on pairs (j, j + hd / 2): the prepared qkv weight holds its rows in that order (weights.py).

    Rounded to `dtype` before the halves are joined: one kernel then writes the result, and none the fp32 of it.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat([half.to(dtype) for half in rotated], dim=-1)
