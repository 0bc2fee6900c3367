"""The demo's poster: for every prompt the dense image, the pruned one under it, and their difference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.bands import upright, wrapped_lines

AMPLIFIED = 4  # how many times the difference is enlarged
ROWS = ("dense", "pruned", f"difference x {AMPLIFIED}")
INK, SOFT, PAPER, LINE_COLOR = (24, 26, 30), (112, 116, 124), (250, 249, 246), (214, 212, 206)
TITLE = "the same prompts, the same seeds"


@dataclass(frozen=True)
class Exhibit:
    """One prompt's images of equal size, and the milliseconds of each."""

    caption: str
    dense: Image.Image
    pruned: Image.Image
    dense_ms: float
    pruned_ms: float

    @property
    def difference(self) -> Image.Image:
        """How far the pruned image is from the dense one, per channel, enlarged."""
        apart = np.abs(np.asarray(self.dense, np.int16) - np.asarray(self.pruned, np.int16))
        return Image.fromarray(np.clip(AMPLIFIED * apart, 0, 255).astype(np.uint8))

    @property
    def figures(self) -> str:
        return f"{self.dense_ms:.0f} ms dense, {self.pruned_ms:.0f} ms pruned"


def hang(exhibits: Sequence[Exhibit], below: str) -> Image.Image:
    """The poster; `below` is a line at its foot: what was drawn, and on what."""
    side = exhibits[0].dense.width
    em = side / 14  # the poster scales with its images
    caption, small, title = (ImageFont.load_default(size * em) for size in (0.95, 0.8, 1.9))
    gap, margin, label = round(em * 0.6), round(em * 2.2), round(em * 1.6)
    lines = [wrapped_lines(exhibit.caption, caption, side) for exhibit in exhibits]
    line = round(em * 1.25)
    text_height = line * max(len(own) for own in lines) + round(em * 1.4)
    top = margin + round(em * 3.2)
    images_height = len(ROWS) * side + (len(ROWS) - 1) * gap
    width = 2 * margin + label + len(exhibits) * side + (len(exhibits) - 1) * 2 * gap
    height = top + images_height + gap + text_height + round(em * 1.6) + margin
    poster = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(poster)
    draw.text((margin + label, margin - em * 0.6), TITLE, INK, title)
    draw.line([(margin + label, top - gap), (width - margin, top - gap)], LINE_COLOR, max(round(em / 9), 1))
    for row, name in enumerate(ROWS):
        poster.paste(upright(name, small, (label, side), SOFT, PAPER), (margin, top + row * (side + gap)))
    for column, (exhibit, own) in enumerate(zip(exhibits, lines, strict=True)):
        x = margin + label + column * (side + 2 * gap)
        for row, image in enumerate((exhibit.dense, exhibit.pruned, exhibit.difference)):
            poster.paste(image, (x, top + row * (side + gap)))
        y = top + images_height + gap
        for text in own:
            draw.text((x, y), text, INK, caption)
            y += line
        draw.text((x, y + em * 0.15), exhibit.figures, SOFT, small)
    draw.text((margin + label, height - margin), below, SOFT, small)
    return poster
