"""Images that a user gives: whatever Pillow reads becomes upright RGB, a mask becomes booleans.

Knows files, pixels and aspect ratios; nothing of tokens or bundles.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import InputError
from ..resize import area_ends
from ..schedule import Size

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Mask = NDArray[np.bool_]  # [H, W], True where the image is redrawn

READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # what Pillow calls 16-bit grey levels
FITS = ("exact", "crop")
PAPER, NOTHING = (255, 255, 255, 255), (0, 0, 0, 255)


def read_image(source: Image.Image | str | Path) -> Image.Image:
    """Upright RGB of 8 bits; transparent parts lie on white.

    Raises:
        InputError: not an image, cut short, or of a kind without a known range.
    """
    return _flattened(_opened(source, "image"), PAPER, "RGB")


def read_mask(source: Image.Image | str | Path) -> Mask:
    """True where the mask is white (above half); transparent parts count as black.

    Raises:
        InputError: as for `read_image`.
    """
    return np.asarray(_flattened(_opened(source, "mask"), NOTHING, "L")) > 127


def _opened(source: Image.Image | str | Path, what: str) -> Image.Image:
    if not isinstance(source, Image.Image | str | Path):
        raise InputError(f"the {what} is a {type(source).__name__}", expected="a PIL image, or the path of a file")
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        image.load()
        return ImageOps.exif_transpose(image)
    except READ_ERRORS as error:
        name = f"{what} {source}" if isinstance(source, str | Path) else f"the {what}"
        raise InputError(
            f"{name} cannot be read: {_reason(error)}",
            expected="a whole image file: PNG, JPEG, WebP, TIFF or whatever else Pillow reads",
            fix="check the path, or save the image anew",
        ) from error


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _flattened(image: Image.Image, behind: tuple[int, ...], mode: str) -> Image.Image:
    if image.mode in SIXTEEN_BITS:
        levels = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(np.rint(levels.clip(0, 255)).astype(np.uint8)).convert(mode)
    try:
        if not image.has_transparency_data:
            if image.mode == "F":
                raise ValueError("floating-point levels have no known range")
            return image.convert(mode)
        return Image.alpha_composite(Image.new("RGBA", image.size, behind), image.convert("RGBA")).convert(mode)
    except ValueError as error:
        raise InputError(
            f"an image of mode {image.mode!r} cannot be used: {error}", fix="convert it to RGB or grey first"
        ) from error


def aspect_box(image: Size, target: Size) -> Box:
    """The largest centred box of the target's aspect ratio in an image; sizes are (height, width)."""
    h, w = image
    box_h, box_w = min(h, round(w * target[0] / target[1])), min(w, round(h * target[1] / target[0]))
    left, top = (w - box_w) // 2, (h - box_h) // 2
    return left, top, left + box_w, top + box_h


def box_to_use(image: Size, target: Size, fit: str) -> Box:
    """The part of the image that is used: all of it where the aspect ratio is right to the pixel.

    Raises:
        InputError: another aspect ratio and `fit` "exact"; says which crop would do.
    """
    if fit not in FITS:
        raise InputError(f"fit {fit!r} not understood", expected=" or ".join(FITS))
    (h, w), (left, top, right, bottom) = image, aspect_box(image, target)
    if fit == "crop" and right > left and bottom > top:
        return left, top, right, bottom
    if w - (right - left) <= 1 and h - (bottom - top) <= 1:
        return 0, 0, w, h
    raise InputError(
        f"the image is {w}x{h}, the bundle draws {target[1]}x{target[0]}: another aspect ratio",
        expected=f"width to height as {target[1]}:{target[0]}",
        fix=f"crop it to {max(right - left, 1)}x{max(bottom - top, 1)} pixels; --fit crop (fit='crop') does so "
        "around its centre",
    )


def same_part(box: Box, image: Size, other: Size) -> Box:
    """A box of one picture, in the pixels of another picture of the same view."""
    (h, w), (rows, columns) = image, other
    left, top, right, bottom = box
    return left * columns // w, top * rows // h, -(-right * columns // w), -(-bottom * rows // h)


def check_same_aspect(mask: Size, image: Size) -> None:
    """Raises InputError where a mask is not of the image's aspect ratio, to the pixel."""
    left, top, right, bottom = aspect_box(mask, image)
    if mask[1] - (right - left) > 1 or mask[0] - (bottom - top) > 1:
        raise InputError(
            f"the mask is {mask[1]}x{mask[0]}, the image {image[1]}x{image[0]}",
            expected="a mask of the image's size, or at least of its aspect ratio",
            fix="draw the mask on a copy of the image",
        )


def touched(mask: Mask, grid: Size) -> Mask:
    """[H, W] -> [*grid]: True where any pixel of the mask falls into a cell, wholly or in part."""
    counts = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    (top, bottom), (left, right) = (area_ends(n, m) for n, m in zip(mask.shape, grid, strict=True))
    rows = counts[bottom + 1] - counts[top]
    inside: Mask = rows[:, right + 1] > rows[:, left]
    return inside
