"""How well the surroundings of a redrawn shape hold, as decoded: before the image's own pixels return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastvar import Pipeline
from fastvar.core.schedule import Size
from fastvar.profiling.tuning.metrics import psnr
from fastvar.runtime.editing.source_image import read_mask, touched

SEEDS = range(2, 8)


@dataclass(frozen=True)
class Background:
    """PSNR to the image, in dB, over all tokens that the mask does not touch: of in-painted images, by seed, and of the
    image tokenizer's round trip, in which the model has no part.
    """

    drawn: tuple[float, ...]
    round_trip: float

    def __str__(self) -> str:
        mean, low, high = np.mean(self.drawn), min(self.drawn), max(self.drawn)
        return f"{mean:.1f} dB ({low:.1f} to {high:.1f}), the tokenizer's round trip {self.round_trip:.1f} dB"


def outside(mask: Image.Image, tokens: Size) -> NDArray[np.bool_]:
    """The pixels [H, W] of those tokens, of a grid of so many, that the mask does not touch."""
    cells = np.ones((mask.height // tokens[0], mask.width // tokens[1]), bool)
    found: NDArray[np.bool_] = np.kron(~touched(read_mask(mask), tokens), cells)
    return found


def background_of(
    pipe: Pipeline,
    image: Image.Image,
    mask: Image.Image,
    subject: Mapping[str, Any],
    seeds: Sequence[int] = SEEDS,
) -> Background:
    """Image and mask have the bundle's size; subject: what is drawn, an argument of the pipeline by its name."""
    schedule = pipe.manifest.plan.schedule
    where = outside(mask, schedule.final)
    kept = pipe.upscale(image, **subject, keep_scales=len(schedule), consistency=False)
    drawn = [pipe.inpaint(image, mask, **subject, seed=seed, composite=False) for seed in seeds]
    *each, round_trip = (psnr(np.asarray(out.images[0])[where], np.asarray(image)[where]) for out in (*drawn, kept))
    return Background(tuple(each), round_trip)
