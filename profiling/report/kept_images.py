"""Heat maps of the kept tokens over the drawn image: the more selections kept a token, the brighter its cell."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..records import KeptMap

LARGEST = 512  # pixels along the longer side of an image in a report
DIMMED = 0.35  # remaining brightness of the image at a token that no selection kept
TINT = 0.6  # opacity of the colour at a token that all selections kept; 0 at one that none kept
# Anchors of the "inferno" colour map, dark to bright, perceptually uniform.
COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))


def picture(image_png: bytes) -> str:
    """The drawn image as a data URI, reduced if it is large."""
    return data_uri(_reduced(image_png))


def heat_map(image_png: bytes, kept: KeptMap) -> str:
    """The heat map over the grey image, as a data URI."""
    grey = np.asarray(_reduced(image_png).convert("L"), np.float64)
    return data_uri(Image.fromarray(painted(grey, enlarged(np.array(kept.counts) / kept.selections, grey.shape))))


def enlarged(cells: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """[h, w] -> [H, W]: each pixel takes the value of its cell."""
    rows, columns = (np.arange(n) * cells.shape[axis] // n for axis, n in enumerate(shape))
    values: NDArray[np.float64] = cells[np.ix_(rows, columns)]
    return values


def painted(grey: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Grey levels and shares from 0 to 1, both [...] -> colours [..., 3]."""
    anchors = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(shares, anchors, [c[i] for c in COLOURS]) for i in range(3)], axis=-1)
    lit = grey * (DIMMED + (1 - DIMMED) * shares)
    opacity = (TINT * shares)[..., None]
    blended = lit[..., None] * (1 - opacity) + colours * opacity
    return np.rint(blended).astype(np.uint8)


def gradient() -> str:
    """The colours over middle grey as a CSS gradient, for the legend."""
    colours = painted(np.full(9, 128.0), np.linspace(0, 1, 9))
    return f"linear-gradient(90deg,{','.join('rgb({},{},{})'.format(*c) for c in colours)})"


def data_uri(image: Image.Image) -> str:
    """A PNG as a data URI."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _reduced(image_png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(image_png)).convert("RGB")
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image
