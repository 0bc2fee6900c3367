"""Infinity's scale schedules, official and beyond, and its pruning policies: FastVAR's published one and ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..core.policy import Preset, PruningPolicy, ScaleRule, dense_policy
from ..core.schedule import ScaleSchedule, Size, find_schedule
from ..errors import PlanError

# Token grids of the 1M bucket by h/w (upstream: infinity/utils/dynamic_resolution.py); the smaller
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

BUCKETS: dict[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}  # name -> number of scales
# Zero-shot: further scales behind a 1M schedule, beyond what any checkpoint was trained on. The first three, and their
# transposes, are FastVAR's; the last two are ours.
_BEYOND: dict[str, tuple[tuple[str, tuple[Size, ...]], ...]] = {
    "1.333": (("1.3M", ((84, 63),)),),
    "2.000": (("1.8M", ((120, 60),)),),
    "1.000": (("1.7M", ((84, 84),)), ("2.25M", ((96, 96),)), ("4M", ((84, 84), (128, 128)))),
}


def official_schedules() -> dict[Size, ScaleSchedule]:
    """Every official schedule, keyed by image (height, width) in pixels."""
    found: dict[Size, ScaleSchedule] = {}
    for sizes in _both_ways():
        for bucket, count in BUCKETS.items():
            schedule = ScaleSchedule(sizes[:count], sizes[-1], bucket)
            found.setdefault(schedule.pixels, schedule)
    return found


def extended_schedules() -> dict[Size, ScaleSchedule]:
    """Schedules beyond the trained resolution, keyed by image (height, width) in pixels."""
    found: dict[Size, ScaleSchedule] = {}
    for ratio, further in _BEYOND.items():
        official = _SCALES_1M[ratio]
        for bucket, scales in further:
            for sizes in ((*official, *scales), _transposed((*official, *scales))):
                schedule = ScaleSchedule(sizes, sizes[len(official) - 1], bucket)
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


def shapes() -> list[Size]:
    """The sizes that a shape such as 16:9 may stand for, (height, width) in pixels: those of the 1M bucket."""
    return [schedule.pixels for schedule in official_schedules().values() if schedule.bucket == "1M"]


def schedule_for(size: Size) -> ScaleSchedule:
    """Infinity's schedule of an image size: the official one, or one beyond the trained resolution.

    Raises:
        PlanError: unsupported size; lists the nearest that work.
    """
    return find_schedule(size, all_schedules())


# The published policy for Infinity (FastVAR, Infinity/): at 1:1, 40 % of the 32x32 tokens and half of the
# 40x40 tokens are dropped, the last two scales of 1M and the last of 0.60M are left out, restored from 24x24.
_PUBLISHED_RULES = {9: ScaleRule(0.6), 10: ScaleRule(0.5), 11: ScaleRule(skip=True), 12: ScaleRule(skip=True)}
# Beyond the trained resolution no rule is published. Ours goes from the last pruned scale to the final one at once, and
# there forwards a quarter of the tokens.
_ZERO_SHOT_KEEP = 0.25
# The paper prunes nothing below the 0.25M bucket; this rule for the seven-scale schedules is ours. Measured on the
# demo: accuracy on 200 held-out captions 1.004 of dense; pruning the 12x12 scale to 0.4 besides gave 0.990.
_SMALL_RULES = {6: ScaleRule(0.25)}
PUBLISHED_LAYERS = (3, 28)
SMALL_SCHEDULE = 7  # scales of the 0.06M bucket, which the paper does not prune


def fastvar_policy(schedule: ScaleSchedule, depth: int) -> PruningPolicy:
    """The `fastvar` preset for a schedule and a model depth."""
    small = len(schedule) <= SMALL_SCHEDULE
    rules = {i: r for i, r in (_SMALL_RULES if small else _PUBLISHED_RULES).items() if i < len(schedule)}
    if schedule.zero_shot:
        rules |= dict.fromkeys(range(BUCKETS["1M"], len(schedule) - 1), ScaleRule(skip=True))
        rules[len(schedule) - 1] = ScaleRule(_ZERO_SHOT_KEEP)
    first, stop = PUBLISHED_LAYERS
    return PruningPolicy("fastvar", rules, min(first, depth), min(stop, depth), 4 if small else 8)


def strong_policy(schedule: ScaleSchedule, depth: int) -> PruningPolicy:
    """The `fastvar-strong` preset: guidance off at the last scale besides, at 256x256 and the sizes like it.

    Chosen from the front of `make tune-demo`, 40 held-out captions, fp32: all scales 1.47 times as fast as dense
    (fastvar 1.08), PSNR to the dense images 27.3 dB (fastvar 28.0), accuracy 0.838 (dense and fastvar 0.836).

    Raises:
        PlanError: a longer schedule, for which nothing was measured.
    """
    if len(schedule) > SMALL_SCHEDULE:
        raise PlanError(
            f"the policy fastvar-strong is not made for schedules of {len(schedule)} scales",
            expected=f"at most {SMALL_SCHEDULE}: it was measured on the 256x256 demo alone",
            fix="choose fastvar, or find a policy with `fastvar tune`",
        )
    base = fastvar_policy(schedule, depth)
    last = len(schedule) - 1
    rules = {**base.rules, last: replace(base.rule(last), guidance=False)}
    return replace(base, name="fastvar-strong", rules=rules)


# Infinity's policies by name; each is made for a schedule and a model depth.
PRESETS: dict[str, Preset] = {
    "dense": dense_policy,
    "fastvar": fastvar_policy,
    "fastvar-strong": strong_policy,
}
