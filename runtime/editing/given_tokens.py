"""Tokens of a given image: quantised at every executed scale, and told to the sampling heads in the place of noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...core.noise import CHOICE, GUMBEL, Noise, uniform_noise
from ...engines.bundle.manifest import Manifest
from ...engines.bundle.weight_file import WeightFile
from ...families.codebook import VqTokenizerConfig, phis_of
from .codebook import Codebook, Codes
from .quantiser import Bits, quantize, tokens_of

FORCE_ONE, FORCE_ZERO = -1.0, 2.0  # noise below and above every probability
CERTAIN = 4e30  # a Gumbel number that outweighs the -1e30 of codes out of the running, doubled by the last scale

Kept = Mapping[int, NDArray[np.bool_]]  # executed scale -> which tokens are the image's [L]


@dataclass(frozen=True)
class GivenTokens(ABC):
    """Tokens of an image at every executed scale, and which of them are kept."""

    kept: Kept

    def noise(self, seed: int) -> Noise:
        """Noise of a seed that forces the kept tokens; the others draw as they would without."""

        def draw(scale: int, shape: tuple[int, ...], stream: str = CHOICE) -> NDArray[np.float32]:
            return self._forcing(scale, uniform_noise(seed, scale, shape, stream), stream).astype(np.float32)

        return draw

    @abstractmethod
    def _forcing(self, scale: int, drawn: NDArray[np.float32], stream: str) -> NDArray[np.floating]:
        """What a seed drew for a scale, with numbers that force in the rows of kept tokens."""


@dataclass(frozen=True)
class GivenBits(GivenTokens):
    """Tokens of bits, by scale [L, bits a token]."""

    bits: Mapping[int, Bits]

    def _forcing(self, scale: int, drawn: NDArray[np.float32], stream: str) -> NDArray[np.floating]:
        forced = np.where(self.bits[scale], FORCE_ONE, FORCE_ZERO)
        return np.where(self.kept[scale][:, None], forced, drawn)


@dataclass(frozen=True)
class GivenCodes(GivenTokens):
    """Codes of a codebook, by scale [L]."""

    codes: Mapping[int, Codes]

    def _forcing(self, scale: int, drawn: NDArray[np.float32], stream: str) -> NDArray[np.floating]:
        kept, codes = self.kept[scale], self.codes[scale]
        if stream == CHOICE:
            return np.where(kept[:, None], -1.0 - codes[:, None], drawn)
        if stream == GUMBEL:  # where codes are mixed, a kept token is its own code alone
            drawn[kept] = 0.0
            drawn[kept, codes[kept]] = CERTAIN
        return drawn


def given_tokens(latent: NDArray[np.float32], kept: Kept, manifest: Manifest, weights: WeightFile) -> GivenTokens:
    """Quantise a latent [channels, h, w] over the executed scales: what is skipped draws nothing, so it takes nothing.

    A bundle's image tokenizer either has a codebook, or makes bits of the latent's signs.
    """
    steps, images, p = manifest.plan.steps, manifest.image_tokenizer, manifest.transformer.patch
    if isinstance(images, VqTokenizerConfig):
        phis = phis_of(manifest.plan)
        codes, _ = Codebook.of(manifest, weights, images.phi_ratio).quantize(
            latent, [(step.size, phis[step.index]) for step in steps]
        )
        return GivenCodes(kept, {step.index: found for step, found in zip(steps, codes, strict=True)})
    bits, _ = quantize(latent, [(step.size[0] * p, step.size[1] * p) for step in steps])
    return GivenBits(kept, {step.index: tokens_of(found, p) for step, found in zip(steps, bits, strict=True)})
