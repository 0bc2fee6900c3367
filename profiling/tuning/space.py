"""The pruning policies that a search tries: a coarse grid over the late scales, and neighbours of a policy."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

from ...core.plan import GenerationPlan, make_plan
from ...core.policy import DENSE, PruningPolicy, ScaleRule
from ...core.schedule import ScaleSchedule

LATE_SHARE = 0.08  # of all tokens: scales with fewer are not pruned
GRID = (1.0, 0.5, 0.25)  # keep ratios of the grid
SMALLEST_KEEP = 0.0625
MOST_SKIPPED = 2  # scales at the end, as in the published policy
MOST_UNGUIDED = 3  # executed scales at the end that may run without guidance
CACHED_REACH = 3  # scales before the first pruned one that it may be restored from


@dataclass(frozen=True)
class PolicySpace:
    """The policies of one schedule and model depth; `layers` are those that its family's own policy prunes."""

    schedule: ScaleSchedule
    depth: int
    layers: tuple[int, int]  # the first, and the one behind the last

    @property
    def late(self) -> tuple[int, ...]:
        """Scales with enough tokens to be pruned; never the first."""
        tokens = [self.schedule.tokens(i) for i in range(len(self.schedule))]
        return tuple(i for i, n in enumerate(tokens) if i > 0 and n >= LATE_SHARE * sum(tokens))

    def plan(self, policy: PruningPolicy) -> GenerationPlan:
        return make_plan(self.schedule, policy, self.depth)

    def share(self, policy: PruningPolicy) -> float:
        """Tokens forwarded through all layers and guidance rows, relative to dense: a cost without noise."""
        return self.plan(policy).forwarded(2) / self.plan(DENSE).forwarded(2)

    def key(self, policy: PruningPolicy) -> Hashable:
        """Equal for policies that run the same engines on the same tokens."""
        plan = self.plan(policy)
        prunes = any(step.prunes for step in plan.steps)
        return plan.steps, (policy.first_layer, policy.stop_layer, policy.shared_selection) if prunes else None

    def policy(
        self,
        keeps: Mapping[int, float],
        skipped: int = 0,
        restore_scale: int | None = None,
        layers: tuple[int, int] | None = None,
        unguided: int = 0,
        textless: Sequence[int] = (),
        shared_selection: bool = False,
    ) -> PruningPolicy:
        """A policy, named after its parts.

        `keeps` maps scales to keep ratios. The last `skipped` scales are left out, and the last `unguided` of the
        others run without guidance. `restore_scale` is by default the scale before the first pruned one, `layers` the
        space's own. Those of the `textless` scales that are pruned do without text.
        """
        end = len(self.schedule) - skipped
        pruned = {i: keep for i, keep in sorted(keeps.items()) if i < end and keep < 1}
        rules = {i: ScaleRule(keep, text=i not in textless) for i, keep in pruned.items()}
        first, stop = layers or self.layers
        if rules and first < stop:
            cached = min(min(rules) - 1, len(self.schedule) if restore_scale is None else restore_scale)
        else:
            rules, first, stop, cached = {}, 0, 0, None
        rules |= {i: replace(rules.get(i, ScaleRule()), guidance=False) for i in range(max(1, end - unguided), end)}
        rules |= {i: ScaleRule(skip=True) for i in range(end, len(self.schedule))}
        policy = PruningPolicy("", rules, first, stop, cached, shared_selection and cached is not None)
        return replace(policy, name=name_of(policy))

    def grid(self) -> list[PruningPolicy]:
        """Keep ratios that never rise from scale to scale, with up to `MOST_SKIPPED` scales left out; without dense.

        The larger a scale, the more of it is redundant (paper, 3.1).
        """
        found = []
        for skipped in range(min(MOST_SKIPPED, len(self.late) - 1) + 1):
            kept = self.late[: len(self.late) - skipped]
            for ratios in combinations_with_replacement(sorted(GRID, reverse=True), len(kept)):
                found.append(self.policy(dict(zip(kept, ratios, strict=True)), skipped))
        return self.distinct(found)

    def distinct(self, policies: Iterable[PruningPolicy]) -> list[PruningPolicy]:
        """Each policy once, without those that run as dense does."""
        dense = self.key(DENSE)
        by_key = {self.key(policy): policy for policy in policies}
        return [policy for key, policy in by_key.items() if key != dense]

    def neighbours(self, policy: PruningPolicy, step: float) -> list[PruningPolicy]:
        """Policies that differ from `policy` in one part; keep ratios differ by `step`."""
        moved = Parts.of(self, policy).moved(self, step)
        found = self.distinct(self.policy(**vars(parts)) for parts in moved)
        return [other for other in found if self.key(other) != self.key(policy)]


@dataclass(frozen=True)
class Parts:
    """The parts of a policy that a neighbour may differ in; `keeps` holds all late scales, also those left out."""

    keeps: Mapping[int, float]
    skipped: int
    restore_scale: int | None
    layers: tuple[int, int] | None
    unguided: int = 0
    textless: tuple[int, ...] = ()
    shared_selection: bool = False

    @classmethod
    def of(cls, space: PolicySpace, policy: PruningPolicy) -> Parts:
        skipped = 0
        while policy.rule(len(space.schedule) - 1 - skipped).skip:
            skipped += 1
        keeps: dict[int, float] = {}
        for i in space.late:  # a scale that is left out comes back pruned like the scale before it
            keeps[i] = next(reversed(keeps.values()), 1.0) if policy.rule(i).skip else policy.rule(i).keep
        prunes = policy.first_layer < policy.stop_layer
        layers = (policy.first_layer, policy.stop_layer) if prunes else None
        unguided = sum(not step.guided for step in space.plan(policy).steps)
        textless = tuple(i for i, rule in policy.rules.items() if not rule.text)
        return cls(keeps, skipped, policy.restore_scale, layers, unguided, textless, policy.shared_selection)

    def moved(self, space: PolicySpace, step: float) -> Iterator[Parts]:
        """Parts that differ in one: keep ratio of a scale, scales left out, restore scale, first layer, guidance."""
        for scale, keep in self.keeps.items():
            moved = (keep - step, keep + step)
            yield from (replace(self, keeps={**self.keeps, scale: k}) for k in moved if SMALLEST_KEEP <= k <= 1)
        most = min(MOST_SKIPPED, len(space.late) - 1)
        yield from (replace(self, skipped=n) for n in (self.skipped - 1, self.skipped + 1) if 0 <= n <= most)
        first = min((scale for scale, keep in self.keeps.items() if keep < 1), default=0)
        yield from (replace(self, restore_scale=n) for n in range(max(0, first - CACHED_REACH), first))
        if self.layers is not None:
            layer, stop = self.layers
            yield from (replace(self, layers=(n, stop)) for n in (layer - 1, layer + 1) if 0 <= n < stop)
        guided = (self.unguided - 1, self.unguided + 1)
        yield from (replace(self, unguided=n) for n in guided if 0 <= n <= MOST_UNGUIDED)


def name_of(policy: PruningPolicy) -> str:
    """A short name: "5k50-6k25-c4-l3" keeps 50 % of scale 5 and 25 % of scale 6, restores from scale 4 and prunes from
    layer 3 on. "6x" leaves scale 6 out, "6g" runs it without guidance, "6t" without text, "s" shares selections.
    """
    rules = [_rule_name(i, rule) for i, rule in sorted(policy.rules.items())]
    layers = [] if policy.restore_scale is None else [f"c{policy.restore_scale}", f"l{policy.first_layer}"]
    shared = ["s"] if policy.shared_selection else []
    return "-".join([*rules, *layers, *shared]) or "dense"


def _rule_name(scale: int, rule: ScaleRule) -> str:
    if rule.skip:
        return f"{scale}x"
    kept = f"k{100 * rule.keep:g}" if rule.keep < 1 else ""
    return f"{scale}{kept}" + ("" if rule.guidance else "g") + ("" if rule.text else "t")


def spread(policies: Sequence[PruningPolicy], cost: Callable[[PruningPolicy], float]) -> list[PruningPolicy]:
    """In an order whose every beginning covers the range of costs: the middle, then the quarters, and so on."""
    left = sorted(policies, key=cost)
    order: list[PruningPolicy] = []
    spans = [(0, len(left))]
    for low, stop in spans:  # halves are appended: breadth first
        if low < stop:
            middle = (low + stop - 1) // 2
            order.append(left[middle])
            spans += [(low, middle), (middle + 1, stop)]
    return order
