"""Tokens of a given image: quantised at every executed scale, and told to the sampling heads in the place of noise.

Codes add up over the scales, so what a token should be depends on what was drawn before it. Where coarse tokens were
drawn anew, the image's own finer ones would correct an error that was never made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.noise import CHOICE, GUMBEL, Noise, uniform_noise
from ...core.schedule import Size
from ...engines.bundle.manifest import Manifest
from ...engines.bundle.weight_file import WeightFile
from ...families.codebook import VqTokenizerConfig, phis_of
from .codebook import Codebook, Codes
from .quantiser import Bits, bits_of, quantize, tokens_of

FORCE_ONE, FORCE_ZERO = -1.0, 2.0  # noise below and above every probability
CERTAIN = 4e30  # a Gumbel number that outweighs the -1e30 of codes out of the running, doubled by the last scale

Kept = Mapping[int, NDArray[np.bool_]]  # executed scale -> which tokens are taken from the image [L]
Sums = Callable[[int], NDArray[np.float32]]  # executed scale -> running sum [channels, h, w] before it is drawn


@dataclass(frozen=True)
class GivenTokens(ABC):
    """An image's latent [channels, h, w], and which tokens are taken from it at every executed scale.

    Up to the first scale in which something is drawn these are the image's own. From there on each is what the
    published quantiser makes of the latent less the sum that was drawn so far.
    """

    latent: NDArray[np.float32]
    kept: Kept

    def noise(self, seed: int, sums: Sums) -> Noise:
        """Noise of a seed that forces the kept tokens; the others draw as they would without.

        sums: asked when the noise of a scale is, and only where that scale keeps tokens and an earlier one drew some.
        """

        def draw(scale: int, shape: tuple[int, ...], stream: str = CHOICE) -> NDArray[np.float32]:
            drawn, kept = uniform_noise(seed, scale, shape, stream), self.kept[scale]
            if not kept.any() or stream not in (CHOICE, GUMBEL):
                return drawn
            return self._forcing(kept, self.at(scale, sums), drawn, stream).astype(np.float32)

        return draw

    def at(self, scale: int, sums: Sums) -> NDArray[Any]:
        """Tokens of a scale: codes [L], or bits [L, bits a token]."""
        if scale in self.own:
            return self.own[scale]
        with np.errstate(invalid="ignore", over="ignore"):  # who draws tells of a sum that is not finite
            return self._quantised(self.latent.astype(np.float64) - sums(scale), scale)

    @cached_property
    def own(self) -> Mapping[int, NDArray[Any]]:
        """Tokens of the image alone, at the scales before which nothing is drawn."""
        whole = list(takewhile(lambda scale: self.kept[scale].all(), self.kept))
        return self._own(list(self.kept)[: len(whole) + 1])

    @abstractmethod
    def _own(self, scales: list[int]) -> Mapping[int, NDArray[Any]]:
        """Tokens of the first executed scales, each after those before it."""

    @abstractmethod
    def _quantised(self, residual: NDArray[np.float64], scale: int) -> NDArray[Any]:
        """Tokens of a scale for what is left of the latent."""

    @abstractmethod
    def _forcing(
        self, kept: NDArray[np.bool_], tokens: NDArray[Any], drawn: NDArray[np.float32], stream: str
    ) -> NDArray[np.floating]:
        """What a seed drew for a scale, with numbers that force in the rows of kept tokens."""


@dataclass(frozen=True)
class GivenBits(GivenTokens):
    """Tokens of bits. `grids`: of every executed scale, in tokenizer cells; a token holds patch x patch of them."""

    grids: Mapping[int, Size]
    patch: int

    def _own(self, scales: list[int]) -> dict[int, Bits]:
        bits, _ = quantize(self.latent, [self.grids[scale] for scale in scales])
        return {scale: tokens_of(found, self.patch) for scale, found in zip(scales, bits, strict=True)}

    def _quantised(self, residual: NDArray[np.float64], scale: int) -> Bits:
        return tokens_of(bits_of(residual, self.grids[scale]), self.patch)

    def _forcing(
        self, kept: NDArray[np.bool_], tokens: Bits, drawn: NDArray[np.float32], stream: str
    ) -> NDArray[np.floating]:
        return np.where(kept[:, None], np.where(tokens, FORCE_ONE, FORCE_ZERO), drawn)


@dataclass(frozen=True)
class GivenCodes(GivenTokens):
    """Codes of a codebook. `grids`: of every executed scale its size and the phi that smooths it."""

    codebook: Codebook
    grids: Mapping[int, tuple[Size, int]]

    def _own(self, scales: list[int]) -> dict[int, Codes]:
        codes, _ = self.codebook.quantize(self.latent, [self.grids[scale] for scale in scales])
        return dict(zip(scales, codes, strict=True))

    def _quantised(self, residual: NDArray[np.float64], scale: int) -> Codes:
        return self.codebook.codes_of(residual, self.grids[scale][0])

    def _forcing(
        self, kept: NDArray[np.bool_], tokens: Codes, drawn: NDArray[np.float32], stream: str
    ) -> NDArray[np.floating]:
        if stream == CHOICE:
            return np.where(kept[:, None], -1.0 - tokens[:, None], drawn)
        drawn[kept] = 0.0  # where codes are mixed, a kept token is its own code alone
        drawn[kept, tokens[kept]] = CERTAIN
        return drawn


def given_tokens(latent: NDArray[np.float32], kept: Kept, manifest: Manifest, weights: WeightFile) -> GivenTokens:
    """The tokens of a latent [channels, h, w]. Scales that are skipped draw nothing, so they take nothing.

    A bundle's image tokenizer either has a codebook, or makes bits of the latent's signs.
    """
    steps, images, p = manifest.plan.steps, manifest.image_tokenizer, manifest.transformer.patch
    if isinstance(images, VqTokenizerConfig):
        phis = phis_of(manifest.plan)
        grids = {step.index: (step.size, phis[step.index]) for step in steps}
        return GivenCodes(latent, kept, Codebook.of(manifest, weights, images.phi_ratio), grids)
    return GivenBits(latent, kept, {step.index: (step.size[0] * p, step.size[1] * p) for step in steps}, p)
