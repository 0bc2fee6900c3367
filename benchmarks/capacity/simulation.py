"""A discrete-event simulation of replicas that draw requests in shared passes. Knows times and counts, no images.

Arrivals are Poisson. A replica draws what waits in passes: the largest of the built sizes that the queue fills, after
waiting `batch_wait_s` for company where it was idle, as `fastvar serve` does. A request that finds the queue of its
replica full is refused.
"""

from __future__ import annotations

import heapq
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from statistics import fmean

WARM_SHARE = 0.1  # of the requests, left out: the queue was empty when they came


class Routing(Enum):
    """How a request finds its replica: the shorter queue of two chosen by chance, as Ray Serve does it; or one queue
    for all, which no router reaches and theory has formulas for.
    """

    TWO_CHOICES = "two choices"
    ONE_QUEUE = "one queue"


@dataclass(frozen=True)
class Service:
    """Times of passes. seconds: images of a pass -> times that were measured, one of which is drawn by chance for each
    pass; `exponential` draws from an exponential distribution of their mean instead.
    """

    seconds: Mapping[int, Sequence[float]]
    exponential: bool = False

    @property
    def sizes(self) -> list[int]:
        return sorted(self.seconds)

    @property
    def images_per_s(self) -> float:
        """Of one replica that never waits, in the passes that suit it best."""
        return max(size / fmean(times) for size, times in self.seconds.items())

    def fitting(self, waiting: int) -> int:
        """Images of the pass that so many requests make."""
        sizes = self.sizes
        return sizes[bisect_right(sizes, waiting) - 1]

    def drawn(self, size: int, dice: random.Random) -> float:
        """Seconds of a pass."""
        times = self.seconds[size]
        return dice.expovariate(1 / fmean(times)) if self.exponential else dice.choice(times)


@dataclass(frozen=True)
class Setting:
    """What is simulated. rate: requests a second. queue: requests of a replica that may wait; none for any number."""

    rate: float
    replicas: int
    service: Service
    queue: int | None = 16
    batch_wait_s: float = 0.005
    routing: Routing = Routing.TWO_CHOICES


@dataclass
class Outcome:
    """Seconds from a request to its image, and how many were refused."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    busy_s: float = 0.0  # of all replicas together
    lasted_s: float = 0.0
    images: int = 0
    passes: int = 0

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    @property
    def refused_share(self) -> float:
        return self.refused / max(1, self.refused + len(self.seconds))


class _Replica:
    """A queue and the pass that is being drawn."""

    def __init__(self) -> None:
        self.waiting: deque[float] = deque()  # when they came
        self.drawing = 0
        self.until = 0.0

    @property
    def length(self) -> int:
        return len(self.waiting) + self.drawing


def simulate(setting: Setting, requests: int, seed: int = 0) -> Outcome:
    """The fate of so many requests; the first tenth is not counted."""
    dice, outcome = random.Random(seed), Outcome()
    own = 1 if setting.routing is Routing.ONE_QUEUE else setting.replicas
    queues = [_Replica() for _ in range(own)]
    free = setting.replicas if setting.routing is Routing.ONE_QUEUE else 0
    servers = _Servers(setting, queues, free, dice, outcome)
    now, counted_from = 0.0, int(requests * WARM_SHARE)
    for number in range(requests):
        now += dice.expovariate(setting.rate)
        servers.advance(now)
        if number == counted_from:
            outcome.__init__()  # type: ignore[misc]  # what came before was for warming up
            begun = now
        servers.arrive(now)
    servers.advance(float("inf"))
    outcome.lasted_s = servers.last - begun
    return outcome


class _Servers:
    """All replicas, and what is going to happen to them."""

    def __init__(
        self, setting: Setting, queues: list[_Replica], free: int, dice: random.Random, outcome: Outcome
    ) -> None:
        self._setting, self._queues, self._dice, self._outcome = setting, queues, dice, outcome
        self._free = free  # replicas of one common queue that draw nothing
        self._events: list[tuple[float, int, int, list[float]]] = []  # when, order, queue, who came when
        self._order, self.last = 0, 0.0  # when the last event was

    def advance(self, now: float) -> None:
        while self._events and self._events[0][0] <= now:
            when, _, number, drawn = heapq.heappop(self._events)
            self.last = when
            queue = self._queues[number]
            if drawn:
                queue.drawing -= len(drawn)
                self._free += 1
                self._outcome.seconds.extend(when - came for came in drawn)
            self._begin(when, number)

    def arrive(self, now: float) -> None:
        number = self._chosen()
        queue, most = self._queues[number], self._setting.queue
        if most is not None and len(queue.waiting) >= most:
            self._outcome.refused += 1
            return
        queue.waiting.append(now)
        self._begin(now, number)

    def _chosen(self) -> int:
        count = len(self._queues)
        if count == 1:
            return 0
        first, second = self._dice.sample(range(count), 2)
        return first if self._queues[first].length <= self._queues[second].length else second

    def _idle(self, queue: _Replica) -> bool:
        return self._free > 0 if self._setting.routing is Routing.ONE_QUEUE else not queue.drawing

    def _begin(self, now: float, number: int) -> None:
        queue, service = self._queues[number], self._setting.service
        if not queue.waiting or not self._idle(queue):
            return
        due = queue.waiting[0] + self._setting.batch_wait_s
        if len(queue.waiting) < service.sizes[-1] and now < due:
            self._push(due, number, [])
            return
        size = service.fitting(len(queue.waiting))
        taken = [queue.waiting.popleft() for _ in range(size)]
        spent = service.drawn(size, self._dice)
        queue.drawing += size
        self._free -= 1
        self._outcome.busy_s += spent
        self._outcome.images += size
        self._outcome.passes += 1
        self._push(now + spent, number, taken)

    def _push(self, when: float, number: int, drawn: list[float]) -> None:
        self._order += 1
        heapq.heappush(self._events, (when, self._order, number, drawn))
