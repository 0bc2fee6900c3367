"""Small pictures of every kind that Pillow knows."""

from __future__ import annotations

import numpy as np
from PIL import Image

RED = (200, 30, 40)
RIGHT_HALF = np.arange(6)[None].repeat(4, 0) >= 3


def red(mode: str) -> Image.Image:
    return Image.new("RGB", (6, 4), RED).convert(mode, palette=Image.Palette.ADAPTIVE)


def grey16() -> Image.Image:
    return Image.fromarray(np.full((4, 6), 130 * 257, np.uint16))


def see_through(mode: str) -> Image.Image:
    """Its right half is transparent."""
    image = Image.new("RGBA", (6, 4), (*RED, 255))
    image.paste((0, 0, 0, 0), (3, 0, 6, 4))
    if mode != "PA":
        return image.convert(mode)
    palette = red("P")
    palette.putalpha(image.getchannel("A"))
    return palette
