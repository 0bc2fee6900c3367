"""What else a machine does while it is measured: its load before, and the share of its cores that others take."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
MOST_OF_OTHERS = 0.10  # of all cores: with more taken by others, times on the wall compare nothing
IDLE = (3, 4)  # of the columns of a `cpu` line: idle, and waiting for disks


@dataclass(frozen=True)
class Peers:
    """`load` is the number of processes that wanted to run in the last minute, before; `share` that of all cores that
    other processes had during the measurement, 0 to 1. None where the system does not tell.
    """

    load: float | None
    share: float | None


def disturbed(share: float | None) -> str:
    """Why times on the wall are worth nothing, where other processes had that share of the cores; empty if they are."""
    if share is None or share <= MOST_OF_OTHERS:
        return ""
    return (
        f"Other processes had {share:.0%} of the cores while this was timed, of which {MOST_OF_OTHERS:.0%} are "
        "allowed: no ratios, for times on the wall compare nothing then. CPU seconds of all threads are told instead, "
        "in which threads that wait for each other count too. Run it again on a quiet machine"
    )


class Watch:
    """A context manager around a measurement; `found` afterwards. What the process has others do is theirs."""

    def __enter__(self) -> Watch:
        self._load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self._begun, self._spent, self._busy = time.perf_counter(), time.process_time(), busy_seconds()
        return self

    def __exit__(self, *exc_info: object) -> None:
        seconds, own, busy = time.perf_counter() - self._begun, time.process_time() - self._spent, busy_seconds()
        self.found = Peers(self._load, share_of_others(seconds, own, self._busy, busy, os.cpu_count() or 1))


def share_of_others(seconds: float, own: float, before: float | None, after: float | None, cores: int) -> float | None:
    """Busy seconds of all cores before and after a while, of which `own` are ours -> what share others had."""
    if before is None or after is None or seconds <= 0:
        return None
    return min(1.0, max(0.0, (after - before - own) / (seconds * cores)))


def busy_seconds(stat: Path = STAT) -> float | None:
    """Seconds that all cores together have worked since the start of the system; None where it does not tell."""
    try:
        line = stat.read_text().splitlines()[0].split()
        counts = [int(number) for number in line[1:9]]  # guests are counted among the others
        return (sum(counts) - sum(counts[i] for i in IDLE)) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
