"""Images that a user gives: whatever Pillow reads becomes upright RGB, a mask becomes booleans.

Knows files, pixels and aspect ratios; nothing of tokens or bundles.
"""

from __future__ import annotations

import io
import os
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ...core.resize import area_ends
from ...core.schedule import Size
from ...errors import InputError
from ..images.formats import READ_ERRORS, read_trouble

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
Mask = NDArray[np.bool_]  # [H, W], True where the image is redrawn

ImageSource = Image.Image | str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | NDArray[Any]

FITS = ("exact", "crop")
PAPER, NOTHING = (255, 255, 255, 255), (0, 0, 0, 255)
WHITE = 127  # a mask is white above
HOLE = 128  # a picture has a hole where its alpha is below
NEAR = 8  # levels to pure black or white that a mask's strokes may differ
PAINTED = 0.95  # of the opaque pixels black or white: painted as a mask, not photographed
KINDS = "a PIL image, the path of a file, its bytes, a file opened in binary, or a numpy array"


def several(name: str, given: Any, count: int) -> list[ImageSource]:
    """Images of a call: one for all of `count` prompts or labels, or a list with one for each.

    Raises:
        InputError: a list of another length.
    """
    if not isinstance(given, list | tuple):
        return [given]
    if len(given) not in (1, count):
        raise InputError(
            f"{name} is a list of {len(given)}, for {count} prompts or labels",
            expected=f"one image, or a list of {count}",
            fix="give a prompt or label for each",
        )
    return list(given)


def read_image(source: ImageSource) -> Image.Image:
    """Upright RGB of 8 bits; transparent parts lie on white.

    Raises:
        InputError: not an image, cut short, or with levels whose range nobody can know.
    """
    image = _flattened(_opened(source, "image"), PAPER, "RGB")
    if int(np.asarray(image).max()) == 1:  # truth values, or shares of 1 that were rounded
        raise _too_dark("image", "its brightest level is 1 of 255", "multiply its levels by 255")
    return image


def read_mask(source: ImageSource) -> Mask:
    """True where the image is redrawn: where the mask is white (above half), or 1 where it knows 0 and 1 only. Of a
    picture with holes, as image editors and other services give it, the holes are.

    Raises:
        InputError: as for `read_image`; nothing is white; or holes in what is itself painted black and white.
    """
    image = _opened(source, "mask")
    holes = _holes(image)
    if holes is not None and holes.any():
        return holes
    levels: NDArray[np.uint8] = np.asarray(_flattened(image, NOTHING, "L"))
    brightest = int(levels.max())
    if brightest == 1:  # it knows 0 and 1 only
        return np.asarray(levels == 1)
    if 1 < brightest <= WHITE:
        raise InputError(
            f"the mask marks nothing: its brightest level is {brightest} of 255, so it holds no white",
            expected="white where the image is to be redrawn, black elsewhere",
            fix="paint the region white, or give an array of booleans",
        )
    return np.asarray(levels > WHITE)


def _holes(image: Image.Image) -> Mask | None:
    """Where a picture is transparent; None where it cannot be."""
    if not image.has_transparency_data:
        return None
    pixels = np.asarray(_converted(image, "RGBA"))
    holes: Mask = pixels[..., 3] < HOLE
    painted = pixels[~holes][:, :3]
    white, black = ((np.abs(painted.astype(int) - level) <= NEAR).all(-1) for level in (255, 0))
    if holes.any() and white.any() and np.mean(white | black) >= PAINTED:
        raise InputError(
            "the mask is painted white and has transparent parts: either could be what is to be redrawn",
            expected="white on black without transparency, or a picture with transparent holes",
            fix="put black behind it if white is meant; fill what is opaque with black if the holes are",
        )
    return holes


def _opened(source: ImageSource, what: str) -> Image.Image:
    """An upright image with levels of 8 bits."""
    if isinstance(source, np.ndarray):
        return _from_array(source, what)
    if isinstance(source, io.TextIOBase):
        raise InputError(f"the {what} is a file opened as text", expected=KINDS, fix='open it with "rb"')
    if isinstance(source, bytes | bytearray | memoryview):
        source = io.BytesIO(source)
    is_path = isinstance(source, str | os.PathLike)
    if not (is_path or isinstance(source, Image.Image) or hasattr(source, "read")):
        raise InputError(f"the {what} is a {type(source).__name__}", expected=KINDS)
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        stored, is_png = _stored_levels(image), image.format == "PNG"
        image.load()
        image = _with_own_transparency(ImageOps.exif_transpose(image), stored)
    except READ_ERRORS as error:
        name = f"{what} {source}" if is_path else f"the {what}"
        raise InputError(
            f"{name} cannot be read: {read_trouble(error)}",
            expected="a whole image file: PNG, JPEG, WebP, TIFF or whatever else Pillow reads",
            fix="check the path, or save the image anew",
        ) from error
    if 0 in image.size:
        raise InputError(f"the {what} is {image.width}x{image.height}", expected="at least one pixel")
    return _of_8_bits(image, what, is_png) if image.mode.startswith("I") else image


def _stored_levels(image: Image.Image) -> str:
    """How a file that is not loaded yet stores its levels, in Pillow's words: "L;2" are grey levels of two bits."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][3]) if tiles else ""


def _with_own_transparency(image: Image.Image, stored: str) -> Image.Image:
    """Pillow scales levels of 2, 4 and 16 bits to 8, but not the level that a PNG file names as transparent."""
    level = image.info.get("transparency")
    if isinstance(level, int) and stored in ("L;2", "L;4"):
        image.info["transparency"] = level * (85 if stored == "L;2" else 17)
    elif isinstance(level, tuple) and (stored == "RGB;16B" or max(level) > 255):
        raise ValueError("one colour of 16 bits is transparent; an alpha channel would do")
    return image


def _of_8_bits(image: Image.Image, what: str, is_png: bool) -> Image.Image:
    """Grey of 16 or 32 bits. Some versions of Pillow keep 16 bits of a PNG file in 32."""
    values, level = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray(_of_integers(values, what, has_16_bits=is_png or image.mode != "I"))
    if level is not None:
        grey.putalpha(Image.fromarray(np.where(values == level, np.uint8(0), np.uint8(255))))
    return grey


def _from_array(values: NDArray[Any], what: str) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.size == 0 or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        channels_first = values.ndim == 3 and values.shape[0] in (1, 3, 4)
        raise InputError(
            f"the {what} is an array of shape {list(values.shape)}",
            expected="[height, width], or [height, width, 3 or 4]",
            fix="put the channels last: array.transpose(1, 2, 0)" if channels_first else "give a single image",
        )
    return Image.fromarray(np.ascontiguousarray(_levels_of(values, what)))


def _levels_of(values: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """An array's levels as 8 bits, where it is plain what they mean."""
    kind = values.dtype.kind
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind in "iu":
        return values if values.dtype == np.uint8 else _of_integers(values, what, values.dtype == np.uint16)
    if kind != "f":
        raise InputError(f"the {what} is an array of {values.dtype}", expected="uint8, or floats from 0 to 1")
    if not np.isfinite(values).all():
        raise InputError(f"the {what} holds NaN or infinity", expected="uint8, or floats from 0 to 1")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        fix = "(array + 1) / 2" if low >= -1 and high <= 1 else "array.astype(np.uint8)"
        raise InputError(
            f"the {what} is an array of {values.dtype} from {low:g} to {high:g}",
            expected="uint8, or floats from 0 to 1",
            fix=f"give {fix}, if that is what is meant",
        )
    return np.asarray(np.rint(values * 255), np.uint8)


def _of_integers(values: NDArray[Any], what: str, has_16_bits: bool) -> NDArray[np.uint8]:
    """Levels of 8 or of 16 bits, in wider integers: 255 is white where no level is above, unless 16 bits are known."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise InputError(f"the {what} has levels from {low} to {high}", expected="8 or 16 bits: 0 to 255, or to 65535")
    if high <= 255 and not (has_16_bits and high > 1):
        return values.astype(np.uint8)
    if high <= 255:
        raise _too_dark(what, f"its brightest level is {high} of 65535", "convert it to 8 bits, array.astype(np.uint8)")
    return np.rint(values / 257).astype(np.uint8)


def _too_dark(what: str, problem: str, fix: str) -> InputError:
    return InputError(f"the {what} is all but black: {problem}", expected="lighter levels", fix=f"{fix}, if so meant")


def _flattened(image: Image.Image, behind: tuple[int, ...], mode: str) -> Image.Image:
    if not image.has_transparency_data:
        return _converted(image, mode)
    on_paper = Image.alpha_composite(Image.new("RGBA", image.size, behind), _converted(image, "RGBA"))
    return on_paper.convert(mode)


def _converted(image: Image.Image, mode: str) -> Image.Image:
    try:
        if image.mode == "F":
            raise ValueError("floating-point levels have no known range")
        return image.convert(mode)
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
