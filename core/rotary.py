"""Two-dimensional rotary positions: the tables that every backend is given as constants. Numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .schedule import Size

BASE = 10000.0


def grid_positions(size: Size, rope_grid: Size) -> NDArray[np.float32]:
    """Where the tokens of an h x w scale lie on the position grid: [h * w, 2] as (row, column).

    float32(i) * (end / size) rounded half to even, as upstream computes it: the rounding is part of the model.
    A scale finer than the grid, beyond the trained resolution, keeps its fractions: rounded, neighbours would share a
    position. So positions never leave the trained range, and those of all official scales are the official ones.
    """
    rows, columns = (_axis_positions(n, end) for n, end in zip(size, rope_grid, strict=True))
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)


def _axis_positions(count: int, end: int) -> NDArray[np.float32]:
    exact = np.arange(count, dtype=np.float32) * np.float32(end / count)
    return exact if count > end else np.rint(exact)


def rotary_table(size: Size, rope_grid: Size, head_dim: int) -> NDArray[np.float32]:
    """Cosines and sines [2, h * w, head_dim / 2]: first half of the angles by row, second half by column."""
    half = head_dim // 2
    frequencies = BASE ** -(np.arange(0, half, 2, dtype=np.float64) / half)
    positions = grid_positions(size, rope_grid).astype(np.float64)
    angles = (positions[:, :, None] * frequencies).reshape(len(positions), half)  # rows' angles, then columns'
    return np.stack((np.cos(angles), np.sin(angles))).astype(np.float32)
