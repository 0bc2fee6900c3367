"""Residual quantisation in numpy: the bits that the image tokenizer makes of a latent, coarse to fine.

The same as `ImageTokenizer.quantize` in export/, which the runtime may not import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.resize import area_matrix, bilinear_matrix
from ...core.schedule import Size

Bits = NDArray[np.bool_]


def quantize(latent: NDArray[np.float32], grids: Iterable[Size]) -> tuple[list[Bits], NDArray[np.float64]]:
    """Latent [bits, h, w] and the grid of every executed scale, in tokenizer cells -> bits and their sum.

    A bit is one where the residual, averaged over its cell, is positive; the codes of a scale, (2 bit - 1) /
    sqrt(bits), are enlarged bilinearly and taken off the residual before the next.

    Returns:
        per scale the bits [bits, h, w], and the summed codes [bits, h, w].
    """
    full = (latent.shape[1], latent.shape[2])
    size = latent.shape[0] ** -0.5
    total = np.zeros(latent.shape)
    found: list[Bits] = []
    for grid in grids:
        bits = bits_of(latent - total, grid)
        total += resampled(np.where(bits, size, -size), full, bilinear_matrix)
        found.append(bits)
    return found, total


def bits_of(residual: NDArray[np.floating], grid: Size) -> Bits:
    """What is left of a latent [bits, h, w] -> the bits [bits, *grid] of one scale."""
    return resampled(residual, grid, area_matrix) > 0


def tokens_of(bits: Bits, patch: int) -> Bits:
    """[bits, h * patch, w * patch] -> [h * w, bits * patch**2]: a token holds patch x patch cells, in the order of
    torch's `pixel_unshuffle`.
    """
    d, rows, columns = bits.shape
    h, w = rows // patch, columns // patch
    cells = bits.reshape(d, h, patch, w, patch)
    return cells.transpose(1, 3, 0, 2, 4).reshape(h * w, d * patch**2)


def resampled(x: NDArray[Any], size: Size, matrix: Callable[[int, int], NDArray[Any]]) -> NDArray[np.float64]:
    """[channels, h, w] -> [channels, *size], by the matrices of core/resize.py."""
    found: NDArray[np.float64] = matrix(x.shape[1], size[0]) @ x @ matrix(x.shape[2], size[1]).T
    return found
