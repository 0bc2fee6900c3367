"""How many replicas a load needs for its slowest hundredth to be fast enough. Knows the simulation only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.capacity.simulation import Outcome, Setting, simulate

MOST_REFUSED = 0.001
MOST_REPLICAS = 100_000
REQUESTS, REQUESTS_A_REPLICA = 40_000, 400


@dataclass(frozen=True)
class Choice:
    """Replicas, and what the simulation saw of them."""

    replicas: int
    outcome: Outcome

    def suits(self, p99_s: float) -> bool:
        return self.outcome.quantile(0.99) <= p99_s and self.outcome.refused_share <= MOST_REFUSED


def tried(setting: Setting, replicas: int) -> Choice:
    """So many replicas under that load."""
    return Choice(replicas, simulate(replace(setting, replicas=replicas), max(REQUESTS, REQUESTS_A_REPLICA * replicas)))


def fewest(setting: Setting, p99_s: float, see: Callable[[Setting, int], Choice] = tried) -> Choice | None:
    """The fewest replicas that answer 99 of 100 requests within `p99_s` and refuse one in a thousand at most; none
    where no number of them can, for a pass alone takes longer.
    """
    alone = sorted(setting.service.seconds[setting.service.sizes[0]])
    if alone[min(len(alone) - 1, int(0.99 * len(alone)))] > p99_s:
        return None
    low = max(1, math.ceil(setting.rate / setting.service.images_per_s))
    high, found = low, see(setting, low)
    while not found.suits(p99_s):
        low, high = high + 1, high + max(1, high // 8)
        if high > MOST_REPLICAS or high > 64 * math.ceil(setting.rate / setting.service.images_per_s) + 64:
            return None
        found = see(setting, high)
    while low < high:  # `high` suits
        middle = (low + high) // 2
        choice = see(setting, middle)
        if choice.suits(p99_s):
            high, found = middle, choice
        else:
            low = middle + 1
    return found
