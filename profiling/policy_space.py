"""The pruning policies that a search tries: a coarse grid over the late scales, and the neighbours of a policy.

Knows schedules and policies; draws and times nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

from ..families.infinity_presets import PUBLISHED_LAYERS
from ..plan import DENSE, GenerationPlan, PruningPolicy, ScaleRule, make_plan
from ..schedule import ScaleSchedule

LATE_SHARE = 0.08  # of all tokens: scales with fewer are not worth pruning
GRID = (1.0, 0.5, 0.25)  # keep ratios of the grid
SMALLEST_KEEP = 0.0625
MOST_SKIPPED = 2  # scales at the end, as in the published policy
MOST_UNGUIDED = 3  # executed scales at the end that may run without guidance
CACHED_REACH = 3  # executed scales before the first pruned one that may be restored from


@dataclass(frozen=True)
class PolicySpace:
    """The policies of one schedule and model depth."""

    schedule: ScaleSchedule
    depth: int

    @property
    def late(self) -> tuple[int, ...]:
        """Scales that hold enough tokens to be worth pruning; never the first."""
        tokens = [self.schedule.tokens(i) for i in range(len(self.schedule))]
        return tuple(i for i, n in enumerate(tokens) if i > 0 and n >= LATE_SHARE * sum(tokens))

    def plan(self, policy: PruningPolicy) -> GenerationPlan:
        return make_plan(self.schedule, policy, self.depth)

    def share(self, policy: PruningPolicy) -> float:
        """Tokens forwarded through all layers and guidance rows, relative to dense: a policy's cost, free of noise."""
        return self.plan(policy).forwarded(2) / self.plan(DENSE).forwarded(2)

    def key(self, policy: PruningPolicy) -> Hashable:
        """Equal for policies that run the same."""
        plan = self.plan(policy)
        prunes = any(step.prunes for step in plan.steps)
        return plan.steps, (policy.first_layer, policy.stop_layer) if prunes else None

    def policy(
        self,
        keeps: Mapping[int, float],
        skipped: int = 0,
        cached_scale: int | None = None,
        layers: tuple[int, int] | None = None,
        unguided: int = 0,
    ) -> PruningPolicy:
        """A policy by what sets it apart, named by that.

        `keeps` maps scales to keep ratios; the last `skipped` scales are left out; of the others the last `unguided`
        run without guidance. Restored from the scale before the first pruned one where no earlier one is given; in the
        published layers unless said otherwise.
        """
        end = len(self.schedule) - skipped
        rules = {i: ScaleRule(keep) for i, keep in sorted(keeps.items()) if i < end and keep < 1}
        first, stop = layers or tuple(min(layer, self.depth) for layer in PUBLISHED_LAYERS)
        if rules and first < stop:
            cached = min(min(rules) - 1, len(self.schedule) if cached_scale is None else cached_scale)
        else:
            rules, first, stop, cached = {}, 0, 0, None
        rules |= {i: replace(rules.get(i, ScaleRule()), guidance=False) for i in range(max(1, end - unguided), end)}
        rules |= {i: ScaleRule(skip=True) for i in range(end, len(self.schedule))}
        policy = PruningPolicy("", rules, first, stop, cached)
        return replace(policy, name=name_of(policy))

    def grid(self) -> list[PruningPolicy]:
        """Keep ratios that never rise from scale to scale, and up to `MOST_SKIPPED` scales left out; not dense.

        The larger a scale, the more of it is redundant (paper, 3.1): that is where a policy prunes most.
        """
        found = []
        for skipped in range(min(MOST_SKIPPED, len(self.late) - 1) + 1):
            kept = self.late[: len(self.late) - skipped]
            for ratios in combinations_with_replacement(sorted(GRID, reverse=True), len(kept)):
                found.append(self.policy(dict(zip(kept, ratios, strict=True)), skipped))
        return self.distinct(found)

    def distinct(self, policies: Iterable[PruningPolicy]) -> list[PruningPolicy]:
        """Each once, and none that runs as dense does."""
        dense = self.key(DENSE)
        by_key = {self.key(policy): policy for policy in policies}
        return [policy for key, policy in by_key.items() if key != dense]

    def neighbours(self, policy: PruningPolicy, step: float) -> list[PruningPolicy]:
        """Policies one move away, itself not among them; keep ratios move by `step`."""
        made = (moved for move in MOVES for moved in move(self, Parts.of(self, policy), step))
        found = self.distinct(self.policy(p.keeps, p.skipped, p.cached_scale, p.layers, p.unguided) for p in made)
        return [other for other in found if self.key(other) != self.key(policy)]


@dataclass(frozen=True)
class Parts:
    """A policy taken apart into what the moves change: keep ratios of all late scales, those left out included."""

    keeps: Mapping[int, float]
    skipped: int
    cached_scale: int | None
    layers: tuple[int, int] | None
    unguided: int = 0

    @classmethod
    def of(cls, space: PolicySpace, policy: PruningPolicy) -> Parts:
        skipped = 0
        while policy.rule(len(space.schedule) - 1 - skipped).skip:
            skipped += 1
        keeps: dict[int, float] = {}
        for i in space.late:  # what is left out would come back pruned like the scale before it
            keeps[i] = next(reversed(keeps.values()), 1.0) if policy.rule(i).skip else policy.rule(i).keep
        prunes = policy.first_layer < policy.stop_layer
        layers = (policy.first_layer, policy.stop_layer) if prunes else None
        unguided = sum(not step.guided for step in space.plan(policy).steps)
        return cls(keeps, skipped, policy.cached_scale, layers, unguided)


def _keep_ratios(_space: PolicySpace, parts: Parts, step: float) -> Iterator[Parts]:
    for scale, keep in parts.keeps.items():
        for moved in (keep - step, keep + step):
            if SMALLEST_KEEP <= moved <= 1:
                yield replace(parts, keeps={**parts.keeps, scale: moved})


def _skipped_scales(space: PolicySpace, parts: Parts, _step: float) -> Iterator[Parts]:
    for skipped in (parts.skipped - 1, parts.skipped + 1):
        if 0 <= skipped <= min(MOST_SKIPPED, len(space.late) - 1):
            yield replace(parts, skipped=skipped)


def _cached_scale(_space: PolicySpace, parts: Parts, _step: float) -> Iterator[Parts]:
    first = min((scale for scale, keep in parts.keeps.items() if keep < 1), default=0)
    for cached in range(max(0, first - CACHED_REACH), first):
        yield replace(parts, cached_scale=cached)


def _first_layer(_space: PolicySpace, parts: Parts, _step: float) -> Iterator[Parts]:
    if parts.layers is not None:
        first, stop = parts.layers
        yield from (replace(parts, layers=(moved, stop)) for moved in (first - 1, first + 1) if 0 <= moved < stop)


def _guidance(_space: PolicySpace, parts: Parts, _step: float) -> Iterator[Parts]:
    for unguided in (parts.unguided - 1, parts.unguided + 1):
        if 0 <= unguided <= MOST_UNGUIDED:
            yield replace(parts, unguided=unguided)


# What a neighbour differs in.
Move = Callable[[PolicySpace, Parts, float], Iterator[Parts]]
MOVES: tuple[Move, ...] = (_keep_ratios, _skipped_scales, _cached_scale, _first_layer, _guidance)


def name_of(policy: PruningPolicy) -> str:
    """What the policy does, short enough for a file: "5k50-6k25-c4-l3" keeps 50 % of scale 5, 25 % of scale 6,
    restores from scale 4 and prunes from layer 3 on; "x" is a scale left out, "6g" one without guidance.
    """
    rules = [_rule_name(i, rule) for i, rule in sorted(policy.rules.items())]
    layers = [] if policy.cached_scale is None else [f"c{policy.cached_scale}", f"l{policy.first_layer}"]
    return "-".join([*rules, *layers]) or "dense"


def _rule_name(scale: int, rule: ScaleRule) -> str:
    if rule.skip:
        return f"{scale}x"
    kept = f"k{100 * rule.keep:g}" if rule.keep < 1 else ""
    return f"{scale}{kept}" + ("" if rule.guidance else "g")


def spread(policies: Sequence[PruningPolicy], cost: Callable[[PruningPolicy], float]) -> list[PruningPolicy]:
    """In an order of which every beginning covers the whole range of costs: the ends, the middle, the quarters."""
    left = sorted(policies, key=cost)
    order: list[PruningPolicy] = []
    spans = [(0, len(left) - 1)]
    while spans:
        following = []
        for low, high in spans:
            if low <= high:
                middle = (low + high) // 2
                order.append(left[middle])
                following += [(low, middle - 1), (middle + 1, high)]
        spans = following
    return order
