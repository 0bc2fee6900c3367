"""The multi-scale VQ image tokenizer of VAR and HART, as nouns: its sizes, and which phi convolution a scale goes by.

Knows no weights, no torch, no files.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.plan import GenerationPlan
from ..errors import CheckpointError
from .base import ImageTokenizerShape

NORM_GROUPS = 32
PHIS = 4  # upstream places the ticks of another number of them by another rule; none was published


@dataclass(frozen=True)
class VqTokenizerConfig(ImageTokenizerShape):
    """Sizes of the tokenizer (upstream: VAR, models/vqvae.py and models/quant.py)."""

    codes: int  # rows of the codebook
    code_channels: int
    base_channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    residual_blocks: int = 2
    phis: int = PHIS
    phi_ratio: float = 0.5  # the share of the convolution in a phi
    max_scales: int = 10  # scales that it was trained on: rows of a buffer that counts how often codes were used

    def __post_init__(self) -> None:
        if min(self.codes, self.code_channels, self.max_scales, len(self.channel_multipliers)) < 1:
            raise CheckpointError(f"invalid model configuration: a size of {self} is not positive")
        for channels in self.level_channels:
            if channels % NORM_GROUPS:
                raise CheckpointError(
                    f"invalid model configuration: {channels} channels of the image tokenizer",
                    expected=f"multiples of {NORM_GROUPS}, the number of normalisation groups",
                )
        if self.phis != PHIS:
            raise CheckpointError(
                f"the image tokenizer has {self.phis} phi convolutions", expected=f"{PHIS}, as all published ones have"
            )


# The published tokenizer of all VAR models (vae_ch160v4096z32).
VAR_TOKENIZER = VqTokenizerConfig(codes=4096, code_channels=32)


def phi_index(scale: int, scales: int) -> int:
    """Which of the four phi convolutions scale `scale` of `scales` goes by: the nearest of ticks from 1/12 to 11/12.

    The middle one of an odd number of scales lies exactly between two ticks. As upstream, rounding decides it: numpy's
    linspace in float64 puts the later tick nearer.
    """
    import numpy as np  # here: nouns of families are imported by commands that need no numpy

    ticks = np.linspace(1 / 3 / PHIS, 1 - 1 / 3 / PHIS, PHIS)
    return int(np.argmin(np.abs(ticks - scale / max(scales - 1, 1))))


def phis_of(plan: GenerationPlan) -> dict[int, int]:
    """The phi convolution of every executed scale, by the scale's index."""
    return {step.index: phi_index(step.index, len(plan.schedule)) for step in plan.steps}
