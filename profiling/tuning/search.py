"""Search for pruning policies: trials, the Pareto front of quality and cost, and the best policy under constraints.

Drawing, comparing and timing are functions that the caller passes in.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from ...core.policy import DENSE, PruningPolicy
from ...errors import InputError
from .space import PolicySpace, spread

REFINING_STEPS = (0.125, 0.0625)  # of keep ratios, one round each
DRAWING_SHARE = 0.75  # of the budget; the rest is for timing


@dataclass(frozen=True)
class Quality:
    """Images of a policy against the dense images at equal seeds."""

    psnr_db: float  # median over the images; infinite for equal ones
    ssim: float  # mean
    accuracy: float | None = None  # 0 to 1; None without a scorer

    def values(self) -> tuple[float, ...]:
        return self.psnr_db, self.ssim, *(() if self.accuracy is None else (self.accuracy,))


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of all scales, of a policy and of dense, drawn alternately."""

    ms: float
    dense_ms: float
    runs: int

    @property
    def ratio(self) -> float:
        """Time relative to dense; below 1 is faster."""
        return self.ms / self.dense_ms


@dataclass(frozen=True)
class Trial:
    """A policy that was tried. `share` is its forwarded tokens relative to dense."""

    policy: PruningPolicy
    share: float
    quality: Quality
    timing: Timing | None = None

    @property
    def ratio(self) -> float:
        """Time relative to dense; of timed trials only."""
        assert self.timing is not None
        return self.timing.ratio


@dataclass(frozen=True)
class Constraints:
    """Bounds on quality. The PSNR drop counts from a reference policy, the accuracy share from the dense accuracy.

    Raises:
        InputError: a share outside 0 to 1, or a negative or infinite PSNR.
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
    """All trials of a search, dense first, and the policy that a PSNR drop counts from."""

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
        """Timed trials that no other trial dominates, the fastest first."""
        return front(self.timed, lambda trial: trial.ratio)

    @property
    def best(self) -> Trial:
        """The fastest trial that meets the constraints; dense if there is none."""
        # The published policy prunes nothing of a shallow model: it is dense then.
        reference = next((trial for trial in self.trials if trial.policy == self.reference), self.dense)
        fits = [t for t in self.timed if self.constraints.met_by(t.quality, self.dense.quality, reference.quality)]
        return min([*fits, self.dense], key=lambda trial: trial.ratio)


def front(trials: Sequence[Trial], cost: Cost) -> list[Trial]:
    """The Pareto front, the cheapest first. Under any bounds on quality it holds the cheapest trial.

    One trial dominates another if it is nowhere worse, in cost and every quality, and somewhere better.
    """

    def dominates(one: Trial, other: Trial) -> bool:
        pairs = [(cost(other), cost(one)), *zip(one.quality.values(), other.quality.values(), strict=True)]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return sorted((t for t in trials if not any(dominates(other, t) for other in trials)), key=cost)


def search(
    space: PolicySpace,
    judge: Judge,
    clock: Clock,
    reference: PruningPolicy,
    constraints: Constraints,
    spent: Callable[[], float],
) -> Tuning:
    """Try the grid, then neighbours of the front by forwarded tokens; time the front.

    Args:
        judge: draws and compares a policy's images.
        clock: times a policy against dense.
        reference: policy that a PSNR drop counts from; always tried.
        spent: share of the budget that is spent. From `DRAWING_SHARE` on no policy is added.
    """
    trials: list[Trial] = []
    seen: set[Hashable] = set()

    def consider(policy: PruningPolicy) -> None:
        key = space.key(policy)
        if key not in seen:
            seen.add(key)
            trials.append(Trial(policy, space.share(policy), judge(policy)))

    def try_all(policies: Sequence[PruningPolicy]) -> None:
        """Try policies in an order that covers the range of costs, wherever the budget ends."""
        for policy in spread(space.distinct(policies), space.share):
            if spent() >= DRAWING_SHARE:
                return
            consider(policy)

    def cheapest() -> list[Trial]:
        return front(trials, lambda trial: trial.share)

    consider(DENSE)
    consider(reference)
    try_all(space.grid())
    for step in REFINING_STEPS:
        try_all([policy for trial in cheapest() for policy in space.neighbours(trial.policy, step)])
    wanted = {id(trial) for trial in (*cheapest(), *trials[:2])}
    timed = [replace(t, timing=clock(t.policy)) if id(t) in wanted else t for t in trials]
    return Tuning(tuple(timed), reference, constraints)
