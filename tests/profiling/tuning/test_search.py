from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvar.core.policy import DENSE, PruningPolicy
from fastvar.errors import InputError
from fastvar.families.infinity_presets import fastvar_policy, schedule_for
from fastvar.profiling.tuning.search import Constraints, Quality, Timing, Trial, Tuning, front, search
from fastvar.profiling.tuning.space import PolicySpace

SPACE = PolicySpace(schedule_for((256, 256)), 8, (3, 8))
FASTVAR = fastvar_policy(SPACE.schedule, 8)


def trial(ratio: float, psnr: float, ssim: float = 0.9, accuracy: float | None = None, name: str = "") -> Trial:
    return Trial(PruningPolicy(name), ratio, Quality(psnr, ssim, accuracy), Timing(100 * ratio, 100.0, 3))


_ratios, _psnrs, _ssims = (st.sampled_from(v) for v in ([0.2, 0.4, 0.6], [20.0, 25.0, inf], [0.8, 0.9]))
_trials = st.lists(st.builds(trial, _ratios, _psnrs, _ssims), min_size=1, max_size=12)


@given(trials=_trials, psnr=st.sampled_from([0.0, 20.0, 25.0]), ssim=st.sampled_from([0.0, 0.8, 0.9]))
def test_the_cheapest_under_any_bounds_is_on_the_front(trials: list[Trial], psnr: float, ssim: float):
    members = front(trials, lambda t: t.ratio)

    def cheapest(some: list[Trial]) -> float:
        fits = [t.ratio for t in some if t.quality.psnr_db >= psnr and t.quality.ssim >= ssim]
        return min(fits, default=inf)

    assert cheapest(members) == cheapest(trials)
    assert [t.ratio for t in members] == sorted(t.ratio for t in members)


def test_the_front_holds_what_nothing_beats():
    a, b, c = trial(0.5, 25), trial(0.5, 24), trial(0.6, 25)
    worse_but_alike = trial(0.7, 20, ssim=0.99)
    assert front([c, b, worse_but_alike, a], lambda t: t.ratio) == [a, worse_but_alike]
    assert front([a, a], lambda t: t.ratio) == [a, a]  # equals do not beat each other


def quality(policy: PruningPolicy) -> Quality:
    """Falls with what is pruned; policies that skip are twice as bad."""
    lost = 1 - SPACE.share(policy)
    skips = any(rule.skip for rule in policy.rules.values())
    return Quality(inf if lost == 0 else 40 - 20 * lost * (1 + skips), 1 - 0.1 * lost)


def run(budget: int = 10_000, constraints: Constraints | None = None) -> tuple[Tuning, list[str], list[str]]:
    drawn: list[PruningPolicy] = []
    timed: list[str] = []

    def judge(policy: PruningPolicy) -> Quality:
        drawn.append(policy)
        return quality(policy)

    def clock(policy: PruningPolicy) -> Timing:
        timed.append(policy.name)
        return Timing(50 + 50 * SPACE.share(policy), 100.0, 9)

    found = search(SPACE, judge, clock, FASTVAR, constraints or Constraints(), lambda: 0.75 * len(drawn) / budget)
    assert len({SPACE.key(policy) for policy in drawn}) == len(drawn), "something was drawn twice"
    return found, [policy.name for policy in drawn], timed


def test_the_grid_is_tried_and_refined_around_the_front():
    found, drawn, timed = run()
    assert drawn[:2] == ["dense", "fastvar"]
    assert {policy.name for policy in SPACE.grid()} <= {*drawn, "6k25-c4-l3"}
    assert any("k37.5" in name for name in drawn), "the first step of refinement"
    assert any("k31.25" in name for name in drawn), "the second"
    by_share = front(found.trials, lambda t: t.share)
    assert set(timed) == {"dense", "fastvar", *(t.policy.name for t in by_share)}
    assert len(timed) < len(drawn), "what the front leaves out is not timed"
    assert all(t.timing is None for t in found.trials if t.policy.name not in timed)


@pytest.mark.parametrize("budget", [1, 2, 5, 12])
def test_nothing_new_is_tried_when_the_budget_is_gone(budget: int):
    found, drawn, _ = run(budget)
    assert len(drawn) == max(2, budget)  # dense and the reference always are
    assert found.dense.policy == DENSE
    assert found.best in found.front


def test_the_best_is_the_fastest_that_meets_the_constraints():
    for drop in (0.0, 1.0, 3.0):
        found, _, _ = run(200, Constraints(max_psnr_drop_db=drop))
        bound = quality(FASTVAR).psnr_db - drop
        assert found.best.quality.psnr_db >= bound
        assert not [t for t in found.timed if t.ratio < found.best.ratio and t.quality.psnr_db >= bound]


def test_dense_is_the_best_where_nothing_else_will_do():
    found, _, _ = run(100, Constraints(min_psnr_db=1000))
    assert found.best is found.dense
    slow = Tuning((trial(1.0, inf, name="dense"), trial(1.1, 40, name="slow")), PruningPolicy("slow"))
    assert slow.best is slow.dense


def test_a_model_too_shallow_for_the_published_policy():
    shallow = PolicySpace(SPACE.schedule, 2, (2, 2))
    published = fastvar_policy(SPACE.schedule, 2)  # prunes nothing here
    judge, clock = lambda p: Quality(inf if p == DENSE else 30.0, 1.0), lambda p: Timing(shallow.share(p), 1.0, 3)
    found = search(shallow, judge, clock, published, Constraints(), lambda: 0.0)
    names = {t.policy.name for t in found.trials}
    assert names >= {"dense", "6x", "5x-6x", "6g"}
    assert not any("k" in name for name in names), "only scales left out, and guidance"
    assert found.best.policy.name == "3g-4g-5x-6x"


DENSE_QUALITY, REFERENCE = Quality(inf, 1.0, 0.8), Quality(28.0, 0.95, 0.7)


@pytest.mark.parametrize(
    ("constraints", "met"),
    [
        (Constraints(), True),
        (Constraints(min_psnr_db=25), True),
        (Constraints(min_psnr_db=25.1), False),
        (Constraints(max_psnr_drop_db=3), True),
        (Constraints(max_psnr_drop_db=2.9), False),
        (Constraints(min_ssim=0.9), True),
        (Constraints(min_ssim=0.91), False),
        (Constraints(min_accuracy_share=0.95), True),  # 0.76 of 0.8
        (Constraints(min_accuracy_share=0.96), False),
        (Constraints(min_psnr_db=20, min_ssim=0.91), False),
    ],
)
def test_constraints(constraints: Constraints, met: bool):
    assert constraints.met_by(Quality(25.0, 0.9, 0.76), DENSE_QUALITY, REFERENCE) is met


def test_accuracy_without_a_scorer_is_no_constraint():
    with pytest.raises(InputError, match="--scorer"):
        Constraints(min_accuracy_share=0.9).met_by(Quality(25, 0.9), Quality(inf, 1), Quality(25, 0.9))


@pytest.mark.parametrize(
    "wrong",
    [{"min_psnr_db": -1.0}, {"max_psnr_drop_db": float("nan")}, {"min_ssim": 1.5}, {"min_accuracy_share": 95.0}],
)
def test_constraints_out_of_range(wrong: dict[str, float]):
    with pytest.raises(InputError, match="out of range"):
        Constraints(**wrong)
