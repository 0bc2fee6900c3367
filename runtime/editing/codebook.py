"""Residual quantisation in numpy: the codes that a VQ image tokenizer makes of a latent, coarse to fine.

The same as `Quantizer.quantize` in export/, which the runtime may not import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ...core.resize import area_matrix, bicubic_matrix
from ...core.schedule import Size
from ...engines.bundle.manifest import Manifest
from ...engines.bundle.weight_file import WeightFile
from ...families.codebook import phis_of
from ..memory.soundness import CODEBOOK, PHI
from .quantiser import resampled

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Codebook:
    """The vectors [codes, channels], and by index the phi convolutions (kernel [channels, channels, 3, 3], bias) that
    smooth what a scale adds. A phi keeps 1 - `phi_ratio` of what it is given.
    """

    vectors: NDArray[np.float64]
    phis: Mapping[int, tuple[NDArray[np.float64], NDArray[np.float64]]]
    phi_ratio: float

    @classmethod
    def of(cls, manifest: Manifest, weights: WeightFile, phi_ratio: float) -> Codebook:
        """The bundle's own, with the phis of its executed scales."""
        phis = {
            index: (_exact(weights, f"{PHI}{index}.weight"), _exact(weights, f"{PHI}{index}.bias"))
            for index in set(phis_of(manifest.plan).values())
        }
        return cls(_exact(weights, CODEBOOK), phis, phi_ratio)

    def quantize(
        self, latent: NDArray[np.float32], grids: Iterable[tuple[Size, int]]
    ) -> tuple[list[Codes], NDArray[np.float64]]:
        """Latent [channels, h, w], and the grid and the phi of every executed scale -> codes and their sum.

        A cell's code is the nearest, by Euclidean distance, to the residual averaged over the cell. The vectors of a
        scale are enlarged bicubically, smoothed, and taken off the residual before the next.

        Returns:
            per scale the codes [tokens], and the sum [channels, h, w].
        """
        full = (latent.shape[1], latent.shape[2])
        total = np.zeros(latent.shape)
        found: list[Codes] = []
        for size, phi in grids:
            found.append(self.codes_of(latent - total, size))
            grid = self.vectors[found[-1]].T.reshape(-1, *size)
            total += self._smoothed(resampled(grid, full, bicubic_matrix), phi)
        return found, total

    def codes_of(self, residual: NDArray[np.floating], size: Size) -> Codes:
        """What is left of a latent [channels, h, w] -> the codes [tokens] of one scale."""
        cells = resampled(residual, size, area_matrix)
        return self.nearest(cells.reshape(len(cells), -1).T)

    def nearest(self, cells: NDArray[np.float64]) -> Codes:
        """Cells [L, channels] -> codes [L]; of equally near ones the first."""
        distance = np.square(self.vectors).sum(1) - 2 * cells @ self.vectors.T  # what all codes share is left out
        codes: Codes = distance.argmin(1)
        return codes

    def _smoothed(self, x: NDArray[np.float64], phi: int) -> NDArray[np.float64]:
        kernel, bias = self.phis[phi]
        windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
        convolved = np.tensordot(kernel, windows, axes=((1, 2, 3), (0, 3, 4))) + bias[:, None, None]
        smoothed: NDArray[np.float64] = (1 - self.phi_ratio) * x + self.phi_ratio * convolved
        return smoothed


def _exact(weights: WeightFile, name: str) -> NDArray[Any]:
    return weights[name].astype(np.float64)
