"""How fast CPUs were measured to multiply matrices, kept from build to build, by CPU and by version of torch.

Keeps figures and chooses by them. Measures nothing, and knows no torch: engines/aotinductor/product_speed.py does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from ...core.version import __version__
from .engine_cache import read_shared, save_shared

SPEEDS = "product-speeds.json"
FLOATS = ("float32", "bfloat16", "float16")  # what may be chosen, the finest first; fp16's range is the narrowest
INT8 = "int8"  # lossy: told, never chosen
CLEARLY = 1.1  # times as fast: with less to gain, the finer numbers are worth more
MOST_ENTRIES = 64
MOST_GFLOPS = 1e6  # of a thread; more is no measurement

_log = logging.getLogger(__name__)


class ProductSpeeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """GFLOP/s of one thread by element type, and what a build for this CPU computes in. `when` is ISO 8601.

    All of FLOATS are there; INT8 is where the CPU has instructions for our kernel.
    """

    cpu: str  # `platform.cpu_identity`
    torch: str  # its version
    fastvar: str  # the version that measured: another one may measure otherwise
    when: str
    gflops: dict[str, float]
    compute: str

    def __post_init__(self) -> None:
        """Raises:
        ValueError: not what is written here; msgspec makes its own error of it.
        """
        if not {*FLOATS} <= self.gflops.keys() <= {*FLOATS, INT8} or self.compute not in FLOATS:
            raise ValueError(f"speeds of {sorted(self.gflops)}, computes in {self.compute!r}")
        if wrong := [speed for speed in self.gflops.values() if not (math.isfinite(speed) and 0 < speed < MOST_GFLOPS)]:
            raise ValueError(f"a speed of {wrong[0]} GFLOP/s")


def fastest(speeds: Mapping[str, float], candidates: Sequence[str] = FLOATS) -> str:
    """The element type to compute in: of the candidates that have a speed, a coarser one where it is clearly faster.

    Args:
        candidates: the finest first; the first one counts whether it is fast or not.
    """
    first, *others = (name for name in candidates if name in speeds)
    best = first
    for name in others:
        best = name if speeds[name] > CLEARLY * speeds[best] else best
    return best


def kept_speeds(folder: Path, cpu: str, torch: str | None = None) -> ProductSpeeds | None:
    """What was measured on a CPU last, with a version of torch if that is given; None where nothing was.

    A file that holds anything else is as none.
    """
    found = [own for own in _read(folder) if own.cpu == cpu and own.fastvar == __version__]
    return next((own for own in reversed(found) if torch in (None, own.torch)), None)


def keep_speeds(folder: Path, found: ProductSpeeds) -> None:
    """In place of what was measured before on that CPU with that version of torch."""
    others = [own for own in _read(folder) if (own.cpu, own.torch) != (found.cpu, found.torch)]
    save_shared(folder / SPEEDS, msgspec.json.encode([*others, found][-MOST_ENTRIES:]))


def _read(folder: Path) -> list[ProductSpeeds]:
    path = folder / SPEEDS
    text = read_shared(path)
    try:
        return msgspec.json.decode(text, type=list[ProductSpeeds]) if text else []
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        _log.warning("%s is damaged, and products will be measured anew: %s", path, error)
        return []
