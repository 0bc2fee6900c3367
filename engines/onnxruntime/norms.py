"""Group norms as one scale and one shift of every channel: onnxruntime would write the tensor out for each step.

Applies to fp32 graphs with GroupNormalization, as export/ traces them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .editor import FLOAT, Rule, constant, reshaped, sliced, static_shape

PART_BYTES = 8 << 20  # of a tensor whose moments are taken at a time


def _pattern(op: Any, x: Any, own_scale: Any, own_shift: Any, gamma: Any, beta: Any) -> Any:
    """norm(x) * gamma + beta"""
    return op.Add(op.Mul(op.GroupNormalization(x, own_scale, own_shift, _outputs=["normed"]), gamma), beta)


def _by_channels(context: Any, x: Any, gamma: Any, beta: Any, **_: Any) -> bool:
    """Whether x [1, C, ...] is fp32, and gamma and beta [1, C, 1, 1] belong to channels."""
    shape = static_shape(x)
    if x.dtype != FLOAT or shape is None or shape[0] != 1:
        return False
    return all(static_shape(value) == (1, shape[1], 1, 1) for value in (gamma, beta))


def _replacement(op: Any, x: Any, own_scale: Any, own_shift: Any, gamma: Any, beta: Any, normed: Any) -> Any:
    """x * scale + shift"""
    shape, attributes = static_shape(x) or (), normed.producer().attributes
    groups, epsilon = attributes.get_int("num_groups"), attributes.get_float("epsilon", 1e-5)
    mean, deviation = _moments(op, x, shape, groups, epsilon)
    own_scale, own_shift = (reshaped(op, value, 1, shape[1], 1, 1) for value in (own_scale, own_shift))
    scale = op.Mul(op.Div(own_scale, deviation), gamma)
    shift = op.Sub(op.Add(op.Mul(own_shift, gamma), beta), op.Mul(mean, scale))
    return op.Add(op.Mul(x, scale), shift)


def _moments(op: Any, x: Any, shape: tuple[int, ...], groups: int, epsilon: float) -> tuple[Any, Any]:
    """Mean and standard deviation of each channel's group, [1, C, 1, 1].

    The variance is the mean of squared deviations from the mean: a difference of mean squares would cancel. Some groups
    are taken at a time, so that deviations stay in the cache.
    """
    channels = shape[1]
    each = math.prod(shape) // groups
    rows, axis = reshaped(op, x, groups, each), constant(op, [1])
    at_once = max(1, PART_BYTES // (4 * each))
    means, variances = [], []
    for first in range(0, groups, at_once):
        part = sliced(op, rows, 0, (first, min(first + at_once, groups)), groups)
        means.append(op.ReduceMean(part, axis, keepdims=1))  # [groups of this part, 1]
        apart = op.Sub(part, means[-1])
        variances.append(op.ReduceMean(op.Mul(apart, apart), axis, keepdims=1))
    mean, variance = (op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0] for parts in (means, variances))
    deviation = op.Sqrt(op.Add(variance, constant(op, np.array(epsilon, np.float32))))
    repeats = constant(op, [1, channels // groups])
    mean, deviation = (reshaped(op, op.Tile(one, repeats), 1, channels, 1, 1) for one in (mean, deviation))
    return mean, deviation


RULES = (Rule(_pattern, _replacement, _by_channels),)
