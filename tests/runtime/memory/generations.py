"""Random generations and their layouts, and some that are always among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.core.schedule import ScaleSchedule, Size
from fastvar.engines.bundle.manifest import Manifest
from fastvar.runtime.memory.layout import Layout, build_layout
from tests.models.described_engines import manifest_for, model


@st.composite
def schedules(draw: st.DrawFn) -> ScaleSchedule:
    growth = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5))
    sizes: list[Size] = [(1, 1)]
    for more_rows, more_columns in growth:
        sizes.append((sizes[-1][0] + more_rows, sizes[-1][1] + more_columns))
    return ScaleSchedule(tuple(sizes), sizes[-1])


@st.composite
def plans(draw: st.DrawFn) -> GenerationPlan:
    schedule = draw(schedules())
    depth = draw(st.integers(1, 3))
    first = draw(st.integers(0, depth))
    stop = draw(st.integers(first, depth))
    cached = draw(st.integers(0, len(schedule) - 1))
    skip = st.just(ScaleRule(skip=True))
    early = {i: draw(skip) for i in range(1, cached) if draw(st.booleans())}
    late = {i: draw(skip | st.builds(ScaleRule, st.floats(0.05, 1))) for i in range(cached + 1, len(schedule))}
    policy = PruningPolicy("drawn", early | late, first, stop, cached)
    return make_plan(schedule, without_guidance(policy, draw(st.integers(1, 2 * len(schedule))), schedule), depth)


def without_guidance(policy: PruningPolicy, start: int, schedule: ScaleSchedule) -> PruningPolicy:
    """Guidance off from a scale on."""
    off = {i: replace(policy.rule(i), guidance=False) for i in range(start, len(schedule))}
    return replace(policy, rules={**policy.rules, **off})


LADDER = ScaleSchedule(((1, 1), (2, 2), (3, 4), (4, 4), (5, 6)), (5, 6))
PRUNED = make_plan(LADDER, PruningPolicy("some", {3: ScaleRule(0.5), 4: ScaleRule(0.3)}, 1, 3, 2), 4)
SKIPPED = make_plan(
    LADDER, PruningPolicy("gaps", {1: ScaleRule(skip=True), 3: ScaleRule(0.4), 4: ScaleRule(skip=True)}, 0, 2, 2), 2
)


UNGUIDED = make_plan(LADDER, without_guidance(PRUNED.policy, 3, LADDER), 4)
layouts = st.builds(
    lambda plan, patchify, rows: laid_out(plan, patchify, rows), plans(), st.booleans(), st.sampled_from((1, 2))
)


def laid_out(plan: GenerationPlan, patchify: bool = False, rows: int = 2) -> tuple[Manifest, Layout]:
    manifest = manifest_for(plan, model(plan.depth, patchify))
    return manifest, build_layout(manifest, rows)


def over_generations(test: Any) -> Any:
    """Random generations, and always a dense, a pruned, a skipping one, and one whose guidance ends."""
    for plan in (make_plan(LADDER, DENSE, 2), PRUNED, SKIPPED, UNGUIDED):
        test = example(laid_out(plan))(test)
    return settings(max_examples=20, deadline=None)(given(layouts)(test))
