"""Resizing as constants: exact matrices and indices, in place of an operator that exports badly and of torch itself."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

CUBIC = -0.75  # torch's parameter of the cubic kernel


def bilinear_matrix(source: int, target: int) -> NDArray[np.float32]:
    """[target, source] weights of bilinear resizing along one axis, no corner alignment (torch's rule)."""
    position = np.maximum((np.arange(target) + 0.5) * (source / target) - 0.5, 0.0)
    low = np.minimum(position.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    weight = position - low
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target), low), 1 - weight)
    np.add.at(matrix, (np.arange(target), high), weight)
    return matrix.astype(np.float32)


def bicubic_matrix(source: int, target: int) -> NDArray[np.float32]:
    """[target, source] weights of bicubic resizing along one axis, a = -0.75, no corner alignment (torch's rule)."""
    position = (np.arange(target) + 0.5) * (source / target) - 0.5
    low = np.floor(position)
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        distance = np.abs(position - (low + tap))
        near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * CUBIC - 4 * CUBIC
        column = np.clip(low + tap, 0, source - 1).astype(np.int64)  # the border goes on outwards
        np.add.at(matrix, (np.arange(target), column), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def area_ends(source: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last source cell that each target cell averages, by torch's rule: when enlarging, at most two."""
    first = np.array([i * source // target for i in range(target)])
    last = np.array([math.ceil((i + 1) * source / target) - 1 for i in range(target)])
    return first, last


def area_matrix(source: int, target: int) -> NDArray[np.float64]:
    """[target, source] weights of area resizing along one axis: the mean of all cells that a target cell touches."""
    first, last = area_ends(source, target)
    cells = np.arange(source)
    touched = (first[:, None] <= cells) & (cells <= last[:, None])
    matrix: NDArray[np.float64] = touched / touched.sum(axis=1, keepdims=True)
    return matrix
