"""Scale schedules: which token grids an image is drawn through, and where their tokens lie."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .errors import PlanError

Size = tuple[int, int]  # (height, width)
PIXELS_PER_TOKEN = 16

# Token grids of the 1M budget by h/w (upstream: infinity/utils/dynamic_resolution.py); the smaller
# budgets are its first 7, 10 and 12 scales. Portrait rows only: landscape is the transpose.
_SCALES_1M: dict[str, tuple[Size, ...]] = {}


def _grids(text: str) -> tuple[Size, ...]:
    return tuple((int(h), int(w)) for h, w in (pair.split("x") for pair in text.split()))


for _ratio, _text in {
    "1.000": "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    "1.250": "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    "1.333": "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    "1.500": "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    "1.750": "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    "2.000": "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    "2.500": "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    "3.000": "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}.items():
    _SCALES_1M[_ratio] = _grids(_text)

BUDGETS: dict[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}  # name -> number of scales
# Zero-shot: further scales behind a 1M schedule, beyond what any checkpoint was trained on. The first three, and their
# transposes, are FastVAR's; the last two are ours.
_BEYOND: dict[str, tuple[tuple[str, tuple[Size, ...]], ...]] = {
    "1.333": (("1.3M", ((84, 63),)),),
    "2.000": (("1.8M", ((120, 60),)),),
    "1.000": (("1.7M", ((84, 84),)), ("2.25M", ((96, 96),)), ("4M", ((84, 84), (128, 128)))),
}


@dataclass(frozen=True)
class ScaleSchedule:
    """Token grids from 1x1 to the final one.

    `position_grid` is the grid that rotary positions are normalised to: the last scale of the 1M budget of the same
    aspect ratio, also when a shorter or a longer schedule runs (rotary.py says what that means for a longer one).
    """

    sizes: tuple[Size, ...]
    position_grid: Size
    budget: str = "custom"
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
        return self.final[0] > self.position_grid[0] or self.final[1] > self.position_grid[1]

    def tokens(self, index: int) -> int:
        h, w = self.sizes[index]
        return h * w


def official_schedules() -> dict[Size, ScaleSchedule]:
    """Every official schedule, keyed by image (height, width) in pixels."""
    found: dict[Size, ScaleSchedule] = {}
    for sizes in _both_ways():
        for budget, count in BUDGETS.items():
            schedule = ScaleSchedule(sizes[:count], sizes[-1], budget)
            found.setdefault(schedule.pixels, schedule)
    return found


def extended_schedules() -> dict[Size, ScaleSchedule]:
    """Schedules beyond the trained resolution, keyed by image (height, width) in pixels."""
    found: dict[Size, ScaleSchedule] = {}
    for ratio, further in _BEYOND.items():
        official = _SCALES_1M[ratio]
        for budget, scales in further:
            for sizes in ((*official, *scales), _transposed((*official, *scales))):
                schedule = ScaleSchedule(sizes, sizes[len(official) - 1], budget)
                found.setdefault(schedule.pixels, schedule)
    return found


def all_schedules() -> dict[Size, ScaleSchedule]:
    """Official schedules and those beyond, keyed by image (height, width) in pixels."""
    return official_schedules() | extended_schedules()


def _both_ways() -> Iterator[tuple[Size, ...]]:
    for portrait in _SCALES_1M.values():
        yield from (portrait, _transposed(portrait))


def _transposed(sizes: tuple[Size, ...]) -> tuple[Size, ...]:
    return tuple((w, h) for h, w in sizes)


def parse_size(text: str) -> Size:
    """'1024x768' (WIDTHxHEIGHT, as image tools print it), '1024', or a shape as '16:9' -> (height, width) in pixels.

    A shape takes the 1M size whose aspect ratio is nearest.

    Raises:
        PlanError: not a size.
    """
    match = re.fullmatch(r"\s*(\d{1,5})\s*(?:([xX×*:])\s*(\d{1,5})\s*)?", text)  # noqa: RUF001 users do type the sign
    if not match or (match[2] == ":" and not int(match[1]) * int(match[3])):
        raise PlanError(
            f"size {text!r} not understood",
            expected="WIDTHxHEIGHT in pixels, or a shape WIDTH:HEIGHT",
            fix="for example 1024x1024 or 16:9; `fastvar sizes` lists all",
        )
    width, height = int(match[1]), int(match[3] or match[1])
    return _nearest_shape(height / width) if match[2] == ":" else (height, width)


def _nearest_shape(ratio: float) -> Size:
    largest = (schedule.pixels for schedule in official_schedules().values() if schedule.budget == "1M")
    return min(largest, key=lambda size: abs(math.log(size[0] / size[1] / ratio)))


def schedule_for(size: Size) -> ScaleSchedule:
    """Infinity's schedule of an image size: the official one, or one beyond the trained resolution.

    Raises:
        PlanError: unsupported size; lists the nearest that work.
    """
    return find_schedule(size, all_schedules())


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
