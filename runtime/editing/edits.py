"""Editing without training: tokens of a given image stand in for drawn ones, at some scales or at some places.

Super-resolution keeps the coarse scales and lets the model draw the fine ones; in-painting keeps every token that the
mask does not touch (as in VAR, Tian et al. 2024, section 5.2). What those tokens are, given_tokens.py says. Knows plans
and pixels; never runs an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ...core.arguments import flag, whole
from ...core.plan import GenerationPlan
from ...core.schedule import PIXELS_PER_TOKEN, Size
from ...errors import InputError
from .given_tokens import Kept
from .source_image import Mask, box_to_use, check_same_aspect, same_part, touched

BACK_PROJECTIONS = 5  # more change nothing that can be seen
FEATHER = 4  # pixels: the original returns over twice as many


@dataclass(frozen=True)
class Editing:
    """What is kept of an image, and what becomes of the drawn one.

    `image` has the bundle's size, and is what is encoded. `kept` holds for every executed scale which tokens are
    taken from it [L]. `finish` takes the drawn image. `record` goes into the output's settings.
    """

    image: Image.Image
    kept: Kept
    finish: Callable[[Image.Image], Image.Image]
    record: Mapping[str, Any]

    @property
    def pixels(self) -> NDArray[np.float32]:
        """[3, H, W] in [-1, 1]."""
        return np.asarray(self.image, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1


def upscaling(
    source: Image.Image, plan: GenerationPlan, *, keep_scales: int | None, fit: str, consistency: bool
) -> Editing:
    """Super-resolution of an RGB image to the plan's size.

    Raises:
        InputError: another aspect ratio, a number of scales out of range, or an image too large or too small.
    """
    consistency, size = flag("consistency", consistency), plan.schedule.pixels
    small = source.crop(box_to_use(source.size[::-1], size, fit))
    scales = len(plan.schedule)
    count = scales_of(small.size[::-1], plan) if keep_scales is None else whole("keep_scales", keep_scales, 1, scales)
    kept = {step.index: np.full(step.tokens, step.index < count) for step in plan.steps}

    def finish(image: Image.Image) -> Image.Image:
        return back_projected(image, small) if consistency else image

    record = {"task": "upscale", "from": f"{small.width}x{small.height}", "keep_scales": count}
    return Editing(resized(small, size), kept, finish, {**record, "consistency": consistency})


def scales_of(image: Size, plan: GenerationPlan) -> int:
    """How many scales an image fills: those whose token grid, at 16 pixels a token, does not exceed it.

    Raises:
        InputError: none, or all of them.
    """
    h, w = (n // PIXELS_PER_TOKEN for n in image)
    count = sum(rows <= h and columns <= w for rows, columns in plan.schedule.sizes)
    if count == 0:
        raise InputError(
            f"the image is {image[1]}x{image[0]}: not even one token",
            expected=f"at least {PIXELS_PER_TOKEN}x{PIXELS_PER_TOKEN} pixels",
            fix="give a larger image, or say --keep-scales (keep_scales=)",
        )
    if count > plan.steps[-1].index:
        raise InputError(
            f"the image is {image[1]}x{image[0]}: it fills all scales of the bundle, none is left to draw",
            expected="an image smaller than {1}x{0}".format(*plan.schedule.pixels),
            fix="use a bundle of a larger --size, or say --keep-scales (keep_scales=)",
        )
    return count


def inpainting(source: Image.Image, mask: Mask, plan: GenerationPlan, *, fit: str, composite: bool) -> Editing:
    """In-painting of an RGB image where the mask [h, w] is True, at the plan's size.

    Raises:
        InputError: another aspect ratio, or a mask that marks nothing or leaves nothing.
    """
    composite, size, own = flag("composite", composite), plan.schedule.pixels, source.size[::-1]
    check_same_aspect((mask.shape[0], mask.shape[1]), own)
    box = box_to_use(own, size, fit)
    left, top, right, bottom = same_part(box, own, (mask.shape[0], mask.shape[1]))
    mask = mask[top:bottom, left:right]
    kept = {step.index: ~touched(mask, step.size).ravel() for step in plan.steps}
    _check_mask(mask, kept[plan.steps[-1].index])
    image = resized(source.crop(box), size)

    def finish(drawn: Image.Image) -> Image.Image:
        return composited(drawn, image, touched(mask, size)) if composite else drawn

    share = round(float(1 - np.mean(kept[plan.steps[-1].index])), 4)
    return Editing(image, kept, finish, {"task": "inpaint", "redrawn": share, "composite": composite})


def _check_mask(mask: Mask, kept: NDArray[np.bool_]) -> None:
    if not mask.any():
        raise InputError(
            "the mask marks nothing: it holds no white",
            expected="white where the image is to be redrawn, black elsewhere",
            fix="paint the region white; if it is black on white, invert the mask",
        )
    if not kept.any():
        raise InputError(
            "the mask leaves nothing of the image: every token is to be redrawn",
            expected="white where the image is to be redrawn, black elsewhere",
            fix="leave some of it black, invert it, or draw a new image with `fastvar generate`",
        )


def resized(image: Image.Image, size: Size) -> Image.Image:
    """To (height, width): bicubic where it grows, Lanczos where it shrinks."""
    grows = size[1] > image.width
    return image.resize(size[::-1], Image.Resampling.BICUBIC if grows else Image.Resampling.LANCZOS)


def back_projected(image: Image.Image, small: Image.Image, steps: int = BACK_PROJECTIONS) -> Image.Image:
    """Make an image agree with the small one that it was drawn from: reduced by averaging, it should give that again.

    Iterative back-projection (Irani and Peleg 1991): what is missing at the small size is enlarged and added.
    """
    pixels, wanted = np.asarray(image, np.float32), np.asarray(small, np.float32)
    for _ in range(steps):
        missing = wanted - _scaled(pixels, small.size, Image.Resampling.BOX)
        pixels = (pixels + _scaled(missing, image.size, Image.Resampling.BICUBIC)).clip(0, 255)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _scaled(pixels: NDArray[np.float32], size: tuple[int, int], kernel: Image.Resampling) -> NDArray[np.float32]:
    """[H, W, 3] -> the given (width, height); in fp32, which Pillow resizes one channel at a time."""
    channels = [Image.fromarray(np.ascontiguousarray(pixels[..., c])).resize(size, kernel) for c in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def composited(drawn: Image.Image, original: Image.Image, mask: Mask) -> Image.Image:
    """The original outside the mask [H, W], the drawn image inside; between them a ramp of 2 * FEATHER pixels,
    outside the mask.
    """
    alpha = Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
    ramp = alpha.filter(ImageFilter.MaxFilter(2 * FEATHER + 1)).filter(ImageFilter.BoxBlur(FEATHER))
    return Image.composite(drawn, original, ramp)
