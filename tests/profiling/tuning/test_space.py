import pytest

from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.families.infinity_presets import fastvar_policy, official_schedules, schedule_for
from fastvar.profiling.tuning.space import GRID, PolicySpace, name_of, spread

SMALL = PolicySpace(schedule_for((256, 256)), 8, (3, 8))
LARGE = PolicySpace(schedule_for((1024, 1024)), 32, (3, 28))


def test_late_scales_are_those_with_many_tokens():
    assert SMALL.late == (4, 5, 6)  # 64, 144 and 256 of 521 tokens
    assert LARGE.late == (9, 10, 11, 12)


def test_the_grid_holds_every_falling_row_of_keep_ratios():
    names = [policy.name for policy in SMALL.grid()]
    assert len(names) == len(set(names)) == 10 + 6 + 3 - 1  # by scales left out; dense is none of them
    assert {"6k50-c5-l3", "5k50-6k25-c4-l3", "6x", "4k25-5x-6x-c3-l3"} <= set(names)
    for policy in SMALL.grid():
        ratios = [policy.rule(i).keep for i in SMALL.late if not policy.rule(i).skip]
        assert ratios == sorted(ratios, reverse=True)
        assert set(ratios) <= set(GRID)


def test_cost_is_forwarded_tokens_over_those_of_dense():
    assert LARGE.share(DENSE) == 1
    assert LARGE.share(fastvar_policy(LARGE.schedule, 32)) == (25 * 2912 + 7 * 4121) / (32 * 10521)


def test_policies_that_run_the_same_are_one():
    nothing = PruningPolicy("another name", {6: ScaleRule(1.0)}, 0, 8, 4)
    assert SMALL.key(nothing) == SMALL.key(DENSE)
    assert SMALL.distinct([nothing, DENSE]) == []
    shallow = PolicySpace(SMALL.schedule, 2, (2, 2))  # no layer is in the published range: only skipping is left
    assert {policy.name for policy in shallow.grid()} == {"6x", "5x-6x"}


def neighbours(policy: PruningPolicy, step: float = 0.125) -> set[str]:
    return {p.name for p in SMALL.neighbours(policy, step)}


def test_neighbours_differ_by_one_move():
    policy = SMALL.policy({5: 0.5, 6: 0.25})
    assert neighbours(policy) == {
        "4k87.5-5k50-6k25-c3-l3",  # one keep ratio
        "5k37.5-6k25-c4-l3",
        "5k62.5-6k25-c4-l3",
        "5k50-6k12.5-c4-l3",
        "5k50-6k37.5-c4-l3",
        "5k50-6x-c4-l3",  # one scale left out
        "5k50-6k25-c2-l3",  # another restore scale
        "5k50-6k25-c3-l3",
        "5k50-6k25-c4-l2",  # another first layer
        "5k50-6k25-c4-l4",
        "5k50-6k25g-c4-l3",  # guidance off at the end
    }


def test_a_scale_without_guidance_costs_half():
    dense, late = SMALL.policy({}), SMALL.policy({}, unguided=1)
    assert late.name == "6g"
    assert SMALL.share(dense) - SMALL.share(late) == pytest.approx(256 / 521 / 2)
    assert "5g-6g" in neighbours(late)
    assert "6g" in neighbours(SMALL.policy({}, unguided=2))


def test_a_scale_that_comes_back_is_pruned_like_the_one_before_it():
    assert "5k50-6k50-c4-l3" in neighbours(SMALL.policy({5: 0.5}, skipped=1))
    assert "6x" not in neighbours(SMALL.policy({}, skipped=1))  # not itself


def test_a_cached_scale_is_kept_where_it_still_comes_first():
    far = SMALL.policy({5: 0.5, 6: 0.5}, restore_scale=3)
    assert "5k50-6k62.5-c3-l3" in neighbours(far)
    assert "4k87.5-5k50-6k50-c3-l3" in neighbours(far)
    assert SMALL.policy({4: 0.5}, restore_scale=4).restore_scale == 3


def test_neighbours_keep_what_no_move_changes():
    policy = SMALL.policy({5: 0.5, 6: 0.25}, textless=(6,), shared_selection=True)
    assert policy.name == "5k50-6k25t-c4-l3-s"
    found = SMALL.neighbours(policy, 0.125)
    assert "5k62.5-6k25t-c4-l3-s" in {p.name for p in found}
    assert all(p.shared_selection for p in found)
    assert all(not p.rule(6).text for p in found if p.rule(6).keep < 1)


@pytest.mark.parametrize("schedule", official_schedules().values(), ids=lambda s: "x".join(map(str, s.pixels)))
@pytest.mark.parametrize("depth", [1, 4, 32])
def test_every_policy_can_be_planned(schedule, depth: int):
    space = PolicySpace(schedule, depth, (min(3, depth), min(28, depth)))
    grid = space.grid()
    for policy in (*grid, *space.neighbours(grid[0], 0.125), *space.neighbours(grid[-1], 0.0625)):
        assert 0 < space.share(policy) < 1, policy  # make_plan raises for what does not fit
        assert name_of(policy) == policy.name


def test_every_beginning_of_a_spread_covers_the_range():
    policies = [PruningPolicy(str(i)) for i in range(31)]
    order = [int(p.name) for p in spread(policies, lambda p: float(p.name))]
    assert sorted(order) == list(range(31))
    assert order[:7] == [15, 7, 23, 3, 11, 19, 27]
