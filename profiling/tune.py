"""Search for pruning policies: trials, the Pareto front of quality and cost, and the best under constraints.

Knows how to choose what is tried; how images are drawn, compared and timed is given to it as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from ..errors import InputError
from ..plan import DENSE, PruningPolicy
from .policy_space import PolicySpace, spread

REFINING_STEPS = (0.125, 0.0625)  # of keep ratios, one round each
DRAWING_SHARE = 0.75  # of the budget; the rest is for timing


@dataclass(frozen=True)
class Quality:
    """Images of a policy against the dense ones at equal seeds."""

    psnr_db: float  # median over the images: equal ones are infinite
    ssim: float  # mean
    accuracy: float | None = None  # what the scorer says, 0 to 1; None without one

    def values(self) -> tuple[float, ...]:
        return self.psnr_db, self.ssim, *(() if self.accuracy is None else (self.accuracy,))


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of all scales, of a policy and of dense, drawn in turn."""

    ms: float
    dense_ms: float
    runs: int

    @property
    def ratio(self) -> float:
        """Time relative to dense; below 1 is faster."""
        return self.ms / self.dense_ms


@dataclass(frozen=True)
class Trial:
    """A policy that was tried. `share` is the tokens it forwards relative to dense."""

    policy: PruningPolicy
    share: float
    quality: Quality
    timing: Timing | None = None

    @property
    def ratio(self) -> float:
        """Time relative to dense, of a trial that was timed."""
        assert self.timing is not None
        return self.timing.ratio


@dataclass(frozen=True)
class Constraints:
    """What a policy must reach. PSNR may drop from that of a reference policy; accuracy is a share of the dense one.

    Raises:
        InputError: a share outside 0 to 1, or a PSNR that is no number of decibels.
    """

    min_psnr_db: float | None = None
    max_psnr_drop_db: float | None = None
    min_ssim: float | None = None
    min_accuracy_share: float | None = None

    def __post_init__(self) -> None:
        shares = {"--min-ssim": self.min_ssim, "--min-accuracy": self.min_accuracy_share}
        for name, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name} {value} is out of range", expected="a share from 0 to 1")
        for name, value in {"--min-psnr": self.min_psnr_db, "--max-psnr-drop": self.max_psnr_drop_db}.items():
            if value is not None and not 0 <= value < inf:
                raise InputError(f"{name} {value} is out of range", expected="decibels, 0 or more")

    def met_by(self, quality: Quality, dense: Quality, reference: Quality) -> bool:
        bounds = [
            (quality.psnr_db, self.min_psnr_db),
            (quality.psnr_db, None if self.max_psnr_drop_db is None else reference.psnr_db - self.max_psnr_drop_db),
            (quality.ssim, self.min_ssim),
        ]
        if self.min_accuracy_share is not None:
            if quality.accuracy is None or dense.accuracy is None:
                raise InputError("--min-accuracy needs an accuracy", fix="give --scorer MODULE:FUNCTION")
            bounds.append((quality.accuracy, self.min_accuracy_share * dense.accuracy))
        return all(bound is None or value >= bound for value, bound in bounds)


Judge = Callable[[PruningPolicy], Quality]
Clock = Callable[[PruningPolicy], Timing]
Cost = Callable[[Trial], float]


@dataclass(frozen=True)
class Tuning:
    """What a search found: every trial, dense first; those that were timed; and the policy that PSNR drops from."""

    trials: tuple[Trial, ...]
    reference: PruningPolicy
    constraints: Constraints = field(default_factory=Constraints)

    @property
    def dense(self) -> Trial:
        return self.trials[0]

    @property
    def timed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.timing is not None]

    @property
    def front(self) -> list[Trial]:
        """Trials that no other one beats, the fastest first; by measured time."""
        return front(self.timed, lambda trial: trial.ratio)

    @property
    def best(self) -> Trial:
        """The fastest that meets the constraints. Dense does where no other one is faster."""
        # A shallow model may have nothing that the published policy prunes: it is dense then.
        reference = next((trial for trial in self.trials if trial.policy == self.reference), self.dense)
        fits = [t for t in self.timed if self.constraints.met_by(t.quality, self.dense.quality, reference.quality)]
        return min([*fits, self.dense], key=lambda trial: trial.ratio)


def front(trials: Sequence[Trial], cost: Cost) -> list[Trial]:
    """Those that no other trial beats: none is at most as costly, at least as good in everything, and not equal.

    The cheapest trial under any bounds on quality is always among them.
    """
    kept = [t for t in trials if not any(_beats(other, t, cost) for other in trials)]
    return sorted(kept, key=cost)


def _beats(one: Trial, other: Trial, cost: Cost) -> bool:
    pairs = list(zip(one.quality.values(), other.quality.values(), strict=True))
    if cost(one) > cost(other) or any(a < b for a, b in pairs):
        return False
    return cost(one) < cost(other) or any(a > b for a, b in pairs)


def search(
    space: PolicySpace,
    judge: Judge,
    clock: Clock,
    reference: PruningPolicy,
    constraints: Constraints,
    spent: Callable[[], float],
) -> Tuning:
    """Try the grid, then what lies around the front, by forwarded tokens; time the front alone.

    Args:
        judge: draws a policy's images and compares them.
        clock: times a policy against dense.
        reference: always tried; PSNR may drop from its.
        spent: share of the budget that is gone; nothing new is tried once too much of it is.
    """
    search = _Search(space, judge, spent)
    search.consider(DENSE)
    search.consider(reference)
    search.try_all(space.grid())
    for step in REFINING_STEPS:
        around = [p for t in front(search.trials, _share) for p in space.neighbours(t.policy, step)]
        search.try_all(around)
    wanted = {id(trial) for trial in (*front(search.trials, _share), *search.trials[:2])}
    timed = [replace(t, timing=clock(t.policy)) if id(t) in wanted else t for t in search.trials]
    return Tuning(tuple(timed), reference, constraints)


class _Search:
    """Trials so far, none of which is made twice."""

    def __init__(self, space: PolicySpace, judge: Judge, spent: Callable[[], float]) -> None:
        self._space, self._judge, self._spent = space, judge, spent
        self.trials: list[Trial] = []
        self._seen: set[object] = set()

    def consider(self, policy: PruningPolicy) -> None:
        key = self._space.key(policy)
        if key not in self._seen:
            self._seen.add(key)
            self.trials.append(Trial(policy, self._space.share(policy), self._judge(policy)))

    def try_all(self, policies: Sequence[PruningPolicy]) -> None:
        """In an order that covers the range of costs, however soon the budget ends it."""
        for policy in spread(self._space.distinct(policies), self._space.share):
            if self._spent() >= DRAWING_SHARE:
                return
            self.consider(policy)


def _share(trial: Trial) -> float:
    return trial.share
