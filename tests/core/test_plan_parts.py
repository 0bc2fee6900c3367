"""Plans whose last scale is drawn in parts, and the choices of drawing that are refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvar.core.plan import MOST_ITERATIONS, SamplingMode, StepPlan, make_plan, part_counts
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.core.schedule import ScaleSchedule
from fastvar.errors import PlanError
from fastvar.families.infinity_presets import schedule_for

SQUARE_SMALL = schedule_for((512, 512))
TWO_SCALES = ScaleSchedule(((1, 1), (2, 2)), (2, 2))


@pytest.mark.parametrize(
    ("tokens", "iterations", "counts"),
    [
        (64, 1, (64,)),
        (12, 3, (2, 4, 6)),
        (256, 8, (5, 15, 24, 31, 39, 45, 48, 49)),
        (4, 2, (2, 2)),
        (3, 2, (1, 2)),
        (5, 5, (1, 1, 1, 1, 1)),  # the cosine alone would leave rounds without a token
    ],
)
def test_rounds_draw_few_tokens_first(tokens: int, iterations: int, counts: tuple[int, ...]):
    """Upstream's numbers."""
    assert part_counts(tokens, iterations) == counts


@given(st.integers(1, MOST_ITERATIONS), st.integers(0, 2000))
def test_every_round_draws_a_token_and_together_they_draw_all(iterations: int, more: int):
    counts = part_counts(iterations + more, iterations)
    assert len(counts) == iterations
    assert min(counts) >= 1
    assert sum(counts) == iterations + more


@pytest.mark.parametrize("iterations", [2, 3, 7])
def test_only_the_last_scale_is_drawn_in_parts(iterations: int):
    plan = make_plan(SQUARE_SMALL, DENSE, 4, SamplingMode(final_iterations=iterations))
    *whole, before = plan.steps[:-iterations]
    assert {(step.part, step.parts) for step in (*whole, before)} == {(None, 1)}
    parts = plan.steps[-iterations:]
    assert [(step.index, step.part, step.parts) for step in parts] == [(9, n, iterations) for n in range(iterations)]
    assert tuple(step.tokens for step in parts) == tuple(s.kept for s in parts) == part_counts(1024, iterations)
    assert {step.next_index for step in parts} == {None}
    assert before.next_index == 9
    for earlier, later in itertools.pairwise(plan.steps):
        assert later.past_dense == later.past_pruned == later.guided_dense == earlier.past_dense + earlier.tokens
    assert plan.capacity(0) == make_plan(SQUARE_SMALL, DENSE, 4).capacity(0)


def test_earlier_scales_may_be_pruned_beside_parts():
    policy = PruningPolicy("earlier", {8: ScaleRule(0.5)}, 0, 4, 7)
    plan = make_plan(SQUARE_SMALL, policy, 4, SamplingMode(final_iterations=2))
    assert [(step.tokens, step.kept) for step in plan.steps[-3:]] == [(576, 288), (300, 300), (724, 724)]


def test_a_pruned_last_scale_is_not_drawn_in_parts():
    policy = PruningPolicy("last", {9: ScaleRule(0.5)}, 0, 4, 7)
    with pytest.raises(PlanError, match="'last' prunes the last scale, which is drawn in 2 iterations"):
        make_plan(SQUARE_SMALL, policy, 4, SamplingMode(final_iterations=2))
    shorter = PruningPolicy("shorter", {8: ScaleRule(0.5), 9: ScaleRule(skip=True)}, 0, 4, 7)
    with pytest.raises(PlanError, match="prunes the last scale"):  # the last that is executed
        make_plan(SQUARE_SMALL, shorter, 4, SamplingMode(final_iterations=2))
    assert make_plan(SQUARE_SMALL, policy, 4, SamplingMode(smooth=True)).sampling_mode.smooth


def test_as_many_iterations_as_tokens_and_no_more():
    plan = make_plan(TWO_SCALES, DENSE, 1, SamplingMode(final_iterations=4))
    assert [step.tokens for step in plan.steps] == [1, 1, 1, 1, 1]
    with pytest.raises(PlanError, match="5 final iterations for 4 tokens") as error:
        make_plan(TWO_SCALES, DENSE, 1, SamplingMode(final_iterations=5))
    assert error.value.expected == "at most 4: one token each"


def test_a_single_scale_is_not_drawn_in_parts():
    policy = PruningPolicy("first", {1: ScaleRule(skip=True)})
    with pytest.raises(PlanError, match="a schedule of one scale"):
        make_plan(TWO_SCALES, policy, 1, SamplingMode(final_iterations=2), first_tokens=4)
    assert make_plan(TWO_SCALES, policy, 1, first_tokens=4).capacity(0) == 4


@pytest.mark.parametrize("count", [0, -1, MOST_ITERATIONS + 1, True, 1.0, "2", None])
def test_iterations_out_of_range(count: object):
    with pytest.raises(PlanError, match="out of range") as error:
        SamplingMode(final_iterations=count)
    assert error.value.expected == "a whole number from 1 to 64"


def test_what_is_asked_for_is_what_differs_from_the_default():
    assert SamplingMode() == SamplingMode(smooth=False, final_iterations=1, residual=True)
    assert SamplingMode().asked_for == ()
    assert SamplingMode(smooth=True, final_iterations=MOST_ITERATIONS).asked_for == ("smooth", "final_iterations")
    assert SamplingMode(residual=False).asked_for == ("residual",)


def test_a_prompt_may_come_first():
    plan = make_plan(TWO_SCALES, DENSE, 1, first_tokens=7)
    assert plan.first_tokens == 7
    assert [(step.tokens, step.kept, step.past_dense) for step in plan.steps] == [(7, 7, 0), (4, 4, 7)]
    assert make_plan(TWO_SCALES, DENSE, 1).first_tokens == 1
    assert make_plan(TWO_SCALES, DENSE, 1).steps[0].tokens == 1


def test_pasts_by_kind_of_layer():
    step = StepPlan(3, (4, 4), 16, 8, 10, 20, False, None, True, 30, 40)
    assert (step.past(pruned_layer=False), step.past(pruned_layer=True)) == (10, 20)
    assert (step.guided_past(pruned_layer=False), step.guided_past(pruned_layer=True)) == (30, 40)
    assert (step.part, step.parts) == (None, 1)
