"""Scale schedules: which token grids an image is drawn through, and where their tokens lie."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import PlanError

Size = tuple[int, int]  # (height, width)
PIXELS_PER_TOKEN = 16


@dataclass(frozen=True)
class ScaleSchedule:
    """Token grids from 1x1 to the final one.

    `rope_grid` is the grid that rotary positions are normalised to: the last scale of the 1M bucket of the same
    aspect ratio, also when a shorter or a longer schedule runs (rotary.py says what that means for a longer one).
    """

    sizes: tuple[Size, ...]
    rope_grid: Size
    bucket: str = "custom"
    pixels_per_token: int = PIXELS_PER_TOKEN

    def __post_init__(self) -> None:
        if not self.sizes:
            raise PlanError("a scale schedule needs at least one scale")
        for (h, w), (h2, w2) in zip(self.sizes, self.sizes[1:], strict=False):
            if h2 < h or w2 < w:
                raise PlanError(f"scales must not shrink: {w2}x{h2} follows {w}x{h}")
        if self.sizes[0] != (1, 1):
            raise PlanError(f"the first scale is {self.sizes[0]}", expected="1x1: it carries the pooled text")

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def final(self) -> Size:
        return self.sizes[-1]

    @property
    def pixels(self) -> Size:
        """(height, width) of the image."""
        return self.final[0] * self.pixels_per_token, self.final[1] * self.pixels_per_token

    @property
    def zero_shot(self) -> bool:
        """Whether the image is finer than any that a checkpoint was trained on."""
        return self.final[0] > self.rope_grid[0] or self.final[1] > self.rope_grid[1]

    def tokens(self, index: int) -> int:
        h, w = self.sizes[index]
        return h * w


def parse_size(text: str, shapes: Sequence[Size] = ()) -> Size:
    """'1024x768' (WIDTHxHEIGHT, as image tools print it), '1024', or a shape as '16:9' -> (height, width) in pixels.

    A shape takes the size among `shapes`, (height, width) in pixels, whose aspect ratio is nearest.

    Raises:
        PlanError: not a size, or a shape where there are none to choose among.
    """
    match = re.fullmatch(r"\s*(\d{1,5})\s*(?:([xX×*:])\s*(\d{1,5})\s*)?", text)  # noqa: RUF001 users do type the sign
    if not match or (match[2] == ":" and not int(match[1]) * int(match[3])):
        raise PlanError(
            f"size {text!r} not understood",
            expected="WIDTHxHEIGHT in pixels, or a shape WIDTH:HEIGHT",
            fix="for example 1024x1024 or 16:9; `fastvar sizes` lists all",
        )
    width, height = int(match[1]), int(match[3] or match[1])
    if match[2] != ":":
        return height, width
    if not shapes:
        raise PlanError(
            f"the shape {text.strip()} stands for no size of this model",
            expected="WIDTHxHEIGHT in pixels: the model draws one shape alone",
            fix="leave the size away, or give it in pixels",
        )
    return min(shapes, key=lambda size: abs(math.log(size[0] / size[1] * width / height)))


def find_schedule(size: Size, schedules: Mapping[Size, ScaleSchedule]) -> ScaleSchedule:
    """The schedule of an image size among those that a model draws, by (height, width) in pixels.

    Raises:
        PlanError: unsupported size; lists the nearest that work.
    """
    if size in schedules:
        return schedules[size]
    h, w = size
    nearest = sorted(schedules, key=lambda s: abs(s[0] - h) + abs(s[1] - w))[:4]
    raise PlanError(
        f"no scale schedule for {w}x{h} pixels",
        expected="one of the sizes that `fastvar sizes` lists",
        fix="the nearest that work: " + ", ".join(f"{width}x{height}" for height, width in nearest),
    )


def square_schedule(sides: tuple[int, ...], pixels_per_token: int = PIXELS_PER_TOKEN) -> ScaleSchedule:
    """A schedule of square grids, positions normalised to its own last one (VAR, HART)."""
    sizes = tuple((side, side) for side in sides)
    return ScaleSchedule(sizes, sizes[-1], pixels_per_token=pixels_per_token)
