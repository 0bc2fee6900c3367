"""Arithmetic on activations laid out as rows: [L * R, C], token outermost, where R counts the rows of all images.

Rows are those of a pass of B images: the conditional rows of all of them, then, with guidance, the unconditional ones.

Keys and values are [S, R * heads, head_dim]. The prefix of a cache is contiguous, and a scale's keys are written behind
it without a copy. Selection and residual stream are fp32 whatever the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.policy import LONGEST_TOPK
from ....core.precision import Precision
from ....core.resize import area_ends
from ....core.schedule import Size

# Activations at the border of a graph that are neither fp32 nor of the compute precision, and those that are.
INTEGERS = frozenset({"kept", "kept_ca", "kept_ffn", "ids", "attention_mask", "labels", "top_k", "codes", "positions"})
COMPUTED = frozenset(
    {"q", "keys", "values", "guided_keys", "guided_values", "text", "text_keys", "text_values"}
    | {f"{end}_{sub_layer}" for end in ("cache", "cached") for sub_layer in ("sa", "ca", "ffn")}
    | {"stripe", "inner_stripe", "residual", "stripe_out", "inner_stripe_out"}
)

_TOPK_OPERATOR: ContextVar[bool] = ContextVar("topk_operator", default=False)

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
ANY = ("", 1)  # a size without a name
OpenDims = dict[str, dict[int, tuple[str, int]]]  # tensor -> dimension -> (name of a size, how many times that size)


def border_dtype(name: str, precision: Precision) -> str:
    """Element type of an activation at the border of a graph."""
    return "int64" if name in INTEGERS else precision.compute if name in COMPUTED else "float32"


def tokens_of(size: Size) -> int:
    """Tokens of a grid."""
    return size[0] * size[1]


def stand_in(size: Size, other: Size) -> Size:
    """Another grid in place of one, with one row or column where it has one (see step_graph.OpenModule)."""
    return (other[0] if size[0] > 1 else 1, other[1] if size[1] > 1 else 1)


def select(x: Tensor, rows: int, count: int) -> Tensor:
    """Token indices [count, R] of each guidance row's pivotal tokens in x [L * R, C]."""
    return pivotal(x.view(-1, rows, x.shape[-1]), count)


def pivotal(tokens: Tensor, count: int) -> Tensor:
    """Indices [count, R] of the tokens [L, R, C] farthest from their mean, farthest first, the lowest first on ties.

    Tokens are the fp32 residual stream before any norm: in bf16 scores tie and other tokens win.
    """
    score = (tokens - tokens.mean(dim=0, keepdim=True)).square().sum(-1)  # [L, R]
    return largest(score, count, dim=0, lowest=-1.0)[1]  # a squared distance is never negative


def largest(x: Tensor, count: int, dim: int, lowest: float) -> tuple[Tensor, Tensor]:
    """The `count` largest of fp32 x along a dimension, falling, and their indices (int64); on ties the lowest first.

    All of x is above `lowest`, and a number.

    torch promises no order among equals. Eager code and programs of torch.export rank distinct integers, which fall
    with x and then with the index: there the order holds on every device.
    ONNX graphs hold a plain TopK, which ONNX defines to give the lowest index first; there is no second key.
    onnxruntime keeps to the definition. TensorRT's documentation says nothing of equals: where scores are equal to the
    last bit, its engines may keep other tokens, as many, and none of them twice.
    Graphs rank in turns where there are more numbers than their compilers rank at once.
    """
    if not _TOPK_OPERATOR.get():
        index = torch.topk(_distinct(x, dim), count, dim=dim).indices
        return x.gather(dim, index), index
    turns = [torch.topk(x, min(count, LONGEST_TOPK), dim=dim)]
    for ranked in range(LONGEST_TOPK, count, LONGEST_TOPK):
        x = x.scatter(dim, turns[-1].indices, lowest)
        turns.append(torch.topk(x, min(count - ranked, LONGEST_TOPK), dim=dim))
    if len(turns) == 1:
        return turns[0].values, turns[0].indices
    return torch.cat([turn.values for turn in turns], dim), torch.cat([turn.indices for turn in turns], dim)


def _distinct(x: Tensor, dim: int) -> Tensor:
    """Integers in the order of x along a dimension, of which no two are equal: of equal x the first has the largest."""
    bits = (x + 0.0).view(torch.int32)  # -0.0 becomes 0.0; the bits of positive numbers are in their order
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    index = torch.arange(x.shape[dim], device=x.device).view([-1 if d == dim else 1 for d in range(x.dim())])
    return (ordered << 32) - index


@contextmanager
def topk_operator() -> Iterator[None]:
    """What is traced within ranks by the TopK operator, for compilers of graphs."""
    token = _TOPK_OPERATOR.set(True)
    try:
        yield
    finally:
        _TOPK_OPERATOR.reset(token)


def tokens_first(features: Sequence[Tensor], images: int) -> Tensor:
    """Features of conditional and unconditional rows, each [T, n], or [B, T, n] of several images -> [T, R, n]."""
    return torch.stack(tuple(features), dim=1) if images == 1 else torch.cat(tuple(features)).transpose(0, 1)


def rows_of(token: Tensor, rows: int) -> Tensor:
    """Token indices [k, R] -> indices [k * R] into activations [L * R, C]."""
    return (token * rows + torch.arange(rows)).flatten()


def of_rows(each: Tensor, images: int, rows: int) -> Tensor:
    """What tokens of each image have, [m * B] -> that of each row [m, R], or [m, 1] where one image is all rows'."""
    if images == 1:
        return each.unsqueeze(1)
    return each.view(-1, images).repeat(1, rows // images)


def restore(fresh: Tensor, kept: Tensor, cached: Tensor, corners: Tensor) -> Tensor:
    """fresh [k * R, C] at the rows `kept`, elsewhere the area-enlarged cache: four gathers and a mean, in fp32.

    An inverse index with a gather fuses; a scatter would write the whole map twice.
    """
    return placed(fresh, kept, enlarged(cached, corners))


def enlarged(cached: Tensor, corners: Tensor) -> Tensor:
    """The cached map enlarged by area [L * R, C] (fp32): each row is the mean of four, corners [4, L * R]."""
    return sum(cached.index_select(0, corner).float() for corner in corners) * 0.25  # type: ignore[return-value]  # never empty


def placed(fresh: Tensor, kept: Tensor, rest: Tensor) -> Tensor:
    """rest [L * R, C], and fresh [k * R, C] in its place at the rows `kept`."""
    inverse = torch.full((rest.shape[0],), -1, dtype=torch.int64).index_put((kept,), torch.arange(kept.shape[0]))
    return torch.where((inverse >= 0).unsqueeze(-1), fresh.index_select(0, inverse.clamp(min=0)), rest)


def first(x: Tensor, count: int, dim: int = 0) -> Tensor:
    """The first `count` along a dimension, where the conditional row lies; x itself where these are all."""
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

    The form of rank 3 becomes one fused kernel; the operator of rank 4 does not in this layout.
    """
    if keys.shape[0] == 1:  # compilers fuse no softmax over one key; over the same key twice they do, to the same end
        keys, values = keys.repeat(2, 1, 1), values.repeat(2, 1, 1)
    scores = (q.transpose(0, 1) @ keys.permute(1, 2, 0)).float()  # [R * heads, k, S]
    if bias is not None:
        scores = scores + bias
    out = torch.softmax(scores, dim=-1).to(values.dtype) @ values.transpose(0, 1)  # [R * heads, k, hd]
    return out.transpose(0, 1).reshape(-1, width)


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm without parameters along the last axis, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


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

    The halves are rounded to `dtype` before they are joined, so that one kernel writes the result, and none its fp32.
    """
    first, second = x.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, first * sin + second * cos)
    return torch.cat([half.to(dtype) for half in rotated], dim=-1)
