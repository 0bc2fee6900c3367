"""Attention as exported, written out in rank 3, in the forms that onnxruntime computes fastest on the CPU.

Attention over the cache becomes one operator that keeps no scores. Attention to the text stays written out, over as
many keys as the longest prompt has: those behind it have a weight of exactly zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .editor import FLOAT, Rule, constant, reshaped, static_shape

MASKED = -1e20  # a bias below it makes a weight of exactly 0 in fp32
CONTRIBUTED = "com.microsoft"  # onnxruntime's own operators
FUSED_BYTES = 4 << 20  # of scores; below, the written-out form is as fast and the cache holds them


def _scores(op: Any, query: Any, keys: Any) -> Any:
    """query [k, heads, hd], keys [S, heads, hd] -> [heads, k, S]"""
    return op.MatMul(op.Transpose(query, perm=[1, 0, 2]), op.Transpose(keys, perm=[1, 2, 0]))


def _weighted(op: Any, scores: Any, values: Any) -> Any:
    """softmax(scores [heads, k, S]) @ values [S, heads, hd] -> [k, heads, hd]"""
    weighted = op.MatMul(op.Softmax(scores, axis=-1), op.Transpose(values, perm=[1, 0, 2]))
    return op.Transpose(weighted, perm=[1, 0, 2])


def _plain(op: Any, query: Any, keys: Any, values: Any) -> Any:
    return _weighted(op, _scores(op, query, keys), values)


def _biased(op: Any, query: Any, keys: Any, values: Any, bias: Any) -> Any:
    return _weighted(op, op.Add(_scores(op, query, keys), bias), values)


def _has_large_scores(context: Any, query: Any, keys: Any, **_: Any) -> bool:
    given, cached = static_shape(query), static_shape(keys)
    if query.dtype != FLOAT or given is None or cached is None:
        return False
    return 4 * given[0] * given[1] * cached[0] >= FUSED_BYTES


def _fused(op: Any, query: Any, keys: Any, values: Any) -> Any:
    """For a batch of one, the operator takes tokens outermost: nothing is transposed."""
    shape = static_shape(query) or ()
    _, heads, width = shape
    given = [reshaped(op, x, 1, (static_shape(x) or ())[0], heads * width) for x in (query, keys, values)]
    return reshaped(op, op.MultiHeadAttention(*given, _domain=CONTRIBUTED, num_heads=heads, scale=1.0), *shape)


def _has_bias_of_keys(context: Any, query: Any, keys: Any, bias: Any, **_: Any) -> bool:
    """Whether the bias is [heads, 1, S]."""
    shape = static_shape(keys)
    return query.dtype == FLOAT and shape is not None and static_shape(bias) == (shape[1], 1, shape[0])


def _shortened(op: Any, query: Any, keys: Any, values: Any, bias: Any) -> Any:
    """The same over the keys up to the last one that any head sees."""
    (length, *_) = static_shape(keys) or ()
    zero, first, last = (constant(op, [axis]) for axis in (0, 1, 2))
    seen = op.ReduceMax(bias, constant(op, [0, 1]), keepdims=0)  # [S]
    seen = op.Greater(seen, constant(op, np.array(MASKED, np.float32)))
    counts = op.Where(seen, constant(op, np.arange(1, length + 1)), first)
    count = op.ReduceMax(counts, zero, keepdims=1)  # [1]
    keys, values = (op.Slice(x, zero, count, zero) for x in (keys, values))
    return _biased(op, query, keys, values, op.Slice(bias, zero, count, last))


RULES = (Rule(_plain, _fused, _has_large_scores), Rule(_biased, _shortened, _has_bias_of_keys))
