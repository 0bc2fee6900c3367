import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvar.core.plan import GenerationPlan, SamplingMode, make_plan
from fastvar.core.policy import (
    DENSE,
    PruningPolicy,
    ScaleRule,
    load_policy,
    policy_from_json,
    policy_to_json,
    policy_to_toml,
)
from fastvar.errors import PlanError, RenamedWarning
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity_presets import (
    PRESETS,
    extended_schedules,
    fastvar_policy,
    official_schedules,
    schedule_for,
)
from fastvar.families.var import VAR

SQUARE_1M = schedule_for((1024, 1024))
SQUARE_SMALL = schedule_for((512, 512))


def _published(schedule, depth=32):
    return make_plan(schedule, fastvar_policy(schedule, depth), depth)


def test_published_plan_at_1m():
    """Figures of the recorded run: 615 and 800 tokens kept, two scales skipped, keys per layer at the end."""
    plan = _published(SQUARE_1M)
    assert [step.index for step in plan.steps] == list(range(11))
    assert [step.kept for step in plan.steps[8:]] == [576, 615, 800]
    assert (plan.capacity(2), plan.capacity(3), plan.capacity(27), plan.capacity(28)) == (4121, 2912, 2912, 4121)
    assert plan.cached_size == (24, 24)
    assert [step.index for step in plan.steps if step.writes_restore_cache] == [8]
    assert [step.index for step in plan.steps if step.prunes] == [9, 10]
    assert plan.steps[10].next_index is None
    assert plan.steps[9].next_index == 10


def test_published_plan_at_a_quarter_of_that():
    plan = _published(SQUARE_SMALL, depth=6)
    assert plan.steps[-1].kept == 615
    assert (plan.capacity(0), plan.capacity(5)) == (2521, 2112)


@pytest.mark.parametrize("schedule", extended_schedules().values(), ids=lambda s: "x".join(map(str, s.pixels)))
def test_beyond_the_trained_resolution_a_quarter_of_the_last_scale_is_forwarded(schedule):
    plan = _published(schedule)
    assert [step.index for step in plan.steps] == [*range(11), len(schedule) - 1]
    assert plan.steps[-1].kept == -(-plan.steps[-1].tokens // 4)
    assert plan.steps[-1].past_pruned == 2112 + 800 or schedule.final[0] != schedule.final[1]


def test_dense_plan_runs_everything_everywhere():
    plan = make_plan(SQUARE_1M, DENSE, 4)
    assert len(plan.steps) == 13
    assert plan.cached_size is None
    assert not any(step.prunes or step.writes_restore_cache for step in plan.steps)
    assert plan.capacity(0) == plan.capacity(3) == 10521
    assert plan.forwarded_tokens == 4 * 10521


def test_forwarded_tokens_count_pruned_and_dense_layers_apart():
    assert _published(SQUARE_1M).forwarded_tokens == 25 * 2912 + 7 * 4121


def test_past_lengths_are_the_sums_of_what_ran_before():
    steps = _published(SQUARE_1M).steps
    for before, step in itertools.pairwise(steps):
        assert step.past_dense == before.past_dense + before.tokens
        assert step.past_pruned == before.past_pruned + before.kept


def test_a_skipped_middle_scale_is_stepped_over():
    plan = make_plan(SQUARE_SMALL, PruningPolicy("gap", {5: ScaleRule(skip=True)}), 4)
    assert [step.index for step in plan.steps] == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert plan.steps[4].next_index == 6
    assert plan.steps[5].past_dense == 1 + 4 + 16 + 36 + 64


def test_keeping_everything_is_the_dense_plan():
    policy = PruningPolicy("all", {9: ScaleRule(1.0)}, 0, 4, 8)
    assert make_plan(SQUARE_SMALL, policy, 4).steps == make_plan(SQUARE_SMALL, DENSE, 4).steps


@pytest.mark.parametrize("schedule", official_schedules().values(), ids=lambda s: "x".join(map(str, s.pixels)))
def test_the_preset_fits_every_official_schedule(schedule):
    plan = _published(schedule)
    pruned = [step.index for step in plan.steps if step.prunes]
    assert pruned
    assert plan.policy.restore_scale < min(pruned)
    assert plan.forwarded_tokens < make_plan(schedule, DENSE, 32).forwarded_tokens


def test_the_preset_never_reaches_past_a_shallow_model():
    assert [_published(SQUARE_SMALL, depth).capacity(0) for depth in (1, 2, 3)] == [2521] * 3
    assert not any(step.prunes for step in _published(SQUARE_SMALL, 3).steps)


@given(tokens=st.integers(1, 5000), dropped=st.integers(0, 99))
def test_as_many_are_dropped_as_whole_tokens_fit_the_ratio(tokens, dropped):
    assert ScaleRule(1 - dropped / 100).kept(tokens) == tokens - tokens * dropped // 100


@pytest.mark.parametrize(
    ("keep", "tokens", "kept"),
    [
        (0.9, 10, 9),  # 10 * (1 - 0.9) is 0.9999999999999998: one token is dropped all the same
        (0.8, 1600, 1280),  # 319.9999999999999
        (0.7, 10, 7),
        (0.5000001, 1000, 501),  # 499.9999 is not rounding, and stays below 500
        (0.01, 3, 1),
        (1.0, 7, 7),
        (1e-12, 5, 1),  # one token is always left
    ],
)
def test_rounding_of_the_ratio_drops_no_token_less(keep, tokens, kept):
    assert ScaleRule(keep).kept(tokens) == kept


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan")])
def test_keep_ratios_out_of_range(keep):
    with pytest.raises(PlanError, match="out of range"):
        ScaleRule(keep)


@pytest.mark.parametrize(
    ("policy", "complaint"),
    [
        (PruningPolicy("p", {9: ScaleRule(0.5)}, 0, 5, 8), "layers 0 to 5"),
        (PruningPolicy("p", {9: ScaleRule(0.5)}, 3, 2, 8), "layers 3 to 2"),
        (PruningPolicy("p", {10: ScaleRule(0.5)}, 0, 4, 8), "names scale 10"),
        (PruningPolicy("p", {0: ScaleRule(skip=True)}), "first scale"),
        (PruningPolicy("p", {9: ScaleRule(0.5)}, 0, 4, None), "restore scale is None"),
        (PruningPolicy("p", {9: ScaleRule(0.5)}, 0, 4, 9), "restore scale is 9"),
        (PruningPolicy("p", {8: ScaleRule(skip=True), 9: ScaleRule(0.5)}, 0, 4, 8), "restore scale is 8"),
        (PruningPolicy("p", {8: ScaleRule(0.5), 9: ScaleRule(0.5)}, 0, 4, 8), "restore scale is 8"),
        (PruningPolicy("p", {9: ScaleRule(0.5)}, 0, 4, -1), "restore scale is -1"),
        (PruningPolicy("p", {9: ScaleRule(0.5)}, -1, 4, 8), "layers -1 to 4"),
        (PruningPolicy("p", {-1: ScaleRule(0.5)}, 0, 4, 8), "names scale -1"),
        (PruningPolicy("p", {0: ScaleRule(0.5)}, 0, 4, 0), "prunes scale 0 but its restore scale is 0"),
    ],
)
def test_policies_that_do_not_fit(policy, complaint):
    with pytest.raises(PlanError, match=complaint):
        make_plan(SQUARE_SMALL, policy, 4)


def test_the_first_scale_may_be_the_cached_one():
    plan = make_plan(SQUARE_SMALL, PruningPolicy("first", {9: ScaleRule(0.5)}, 0, 4, 0), 4)
    assert plan.cached_size == (1, 1)
    assert [step.index for step in plan.steps if step.writes_restore_cache] == [0]


def test_pasts_behind_two_pruned_scales():
    plan = make_plan(SQUARE_1M, PruningPolicy("two", {9: ScaleRule(0.6), 10: ScaleRule(0.5)}, 3, 28, 8), 32)
    tokens = [SQUARE_1M.tokens(i) for i in range(13)]
    assert plan.steps[11].past_dense == sum(tokens[:11])
    assert plan.steps[11].past_pruned == sum(tokens[:9]) + 615 + 800
    assert plan.capacity(3) == sum(tokens) - (1024 - 615) - (1600 - 800)


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (ScaleRule(), "keep"),
        (DENSE, "name"),
        (SamplingMode(), "smooth"),
        (make_plan(SQUARE_SMALL, DENSE, 1), "depth"),
        (make_plan(SQUARE_SMALL, DENSE, 1).steps[0], "kept"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_plans_are_values(value, field):
    """Shared by manifests and sessions: who wants another makes another."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, getattr(value, field))


def test_a_plan_samples_plainly_and_begins_with_one_token_unless_told_otherwise():
    plan = make_plan(SQUARE_SMALL, DENSE, 2)
    assert GenerationPlan(plan.schedule, plan.policy, plan.depth, plan.steps) == plan
    assert (plan.sampling_mode, plan.first_tokens, plan.steps[0].tokens) == (SamplingMode(), 1, 1)


def test_a_policy_prunes_nothing_unless_told_where():
    policy = PruningPolicy("nowhere", {9: ScaleRule(0.5)})
    assert not any(policy.prunes(layer) for layer in range(-1, 3))
    assert make_plan(SQUARE_SMALL, policy, 4).cached_size is None


def test_a_policy_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("restore_scale = 7\nlayers = [1, 3]\n[scale.8]\nkeep = 0.25\n[scale.9]\nskip = true\n")
    policy = INFINITY.policy(str(file), SQUARE_SMALL, 4)
    assert policy == PruningPolicy("mine", {8: ScaleRule(0.25), 9: ScaleRule(skip=True)}, 1, 3, 7)
    plan = make_plan(SQUARE_SMALL, policy, 4)
    assert [step.kept for step in plan.steps[7:]] == [400, 144]
    assert [policy.prunes(layer) for layer in range(4)] == [False, True, True, False]


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "layers = [3]",
        "layers = [0.5, 3]",
        "layers = [false, 3]",
        "restore_scale = 7.0",
        "restore_scale = true",
        "shared_selection = 1",
        "colour = 1",
        "[scale.x]\nkeep = 0.5",
        "[scale.9]\nkept = 0.5",
        "scale = 3",
    ],
)
def test_policy_files_that_are_not_understood(tmp_path, text):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(PlanError, match="not understood"):
        INFINITY.policy(str(file), SQUARE_SMALL, 4)


OFF = ScaleRule(guidance=False)


def test_guidance_ends_where_the_policy_says():
    plan = make_plan(SQUARE_SMALL, PruningPolicy("late", {8: OFF, 9: ScaleRule(0.5, guidance=False)}, 1, 3, 7), 4)
    assert [step.guided for step in plan.steps] == [True] * 8 + [False] * 2
    assert [step.rows(2) for step in plan.steps[7:]] == [2, 1, 1]
    assert {step.rows(1) for step in plan.steps} == {1}
    before = sum(SQUARE_SMALL.tokens(i) for i in range(8))
    assert [step.guided_dense for step in plan.steps[7:]] == [before - 400, before, before]
    assert plan.steps[9].past_dense == before + 576
    assert policy_from_json(policy_to_json(plan.policy)) == plan.policy


def test_scales_that_are_skipped_have_no_say_in_guidance():
    plan = make_plan(SQUARE_SMALL, PruningPolicy("gap", {7: OFF, 8: ScaleRule(skip=True), 9: OFF}), 4)
    assert [step.index for step in plan.steps if not step.guided] == [7, 9]


@pytest.mark.parametrize(
    ("rules", "complaint"),
    [
        ({7: OFF, 9: OFF}, "on again at scale 8"),
        ({8: OFF}, "on again at scale 9"),
        (dict.fromkeys(range(10), OFF), "from the first scale on"),
    ],
)
def test_guidance_that_cannot_be_planned(rules, complaint):
    with pytest.raises(PlanError, match=complaint) as caught:
        make_plan(SQUARE_SMALL, PruningPolicy("p", rules), 4)
    assert "guidance" in caught.value.fix


def test_guidance_in_a_policy_file(tmp_path):
    file = tmp_path / "late.toml"
    file.write_text("[scale.8]\nguidance = false\n[scale.9]\nguidance = false\n")
    assert INFINITY.policy(str(file), SQUARE_SMALL, 4).rules == {8: OFF, 9: OFF}
    file.write_text("[scale.9]\nguidance = 0\n")
    with pytest.raises(PlanError, match="guidance is 0, expected true or false"):
        INFINITY.policy(str(file), SQUARE_SMALL, 4)


def test_text_ends_at_the_pruned_scales_that_say_so(tmp_path):
    file = tmp_path / "late.toml"
    file.write_text("restore_scale = 7\nlayers = [1, 3]\n[scale.8]\nkeep = 0.5\n[scale.9]\nkeep = 0.25\ntext = false\n")
    policy = INFINITY.policy(str(file), SQUARE_SMALL, 4)
    assert [step.text for step in make_plan(SQUARE_SMALL, policy, 4).steps] == [True] * 9 + [False]
    assert policy_from_json(policy_to_json(policy)) == policy
    file.write_text(policy_to_toml(policy))
    assert INFINITY.policy(str(file), SQUARE_SMALL, 4) == policy
    file.write_text('[scale.9]\ntext = "no"\n')
    with pytest.raises(PlanError, match="text is 'no', expected true or false"):
        INFINITY.policy(str(file), SQUARE_SMALL, 4)


@pytest.mark.parametrize(
    ("rule", "layers"),
    [
        (ScaleRule(text=False), (1, 3)),
        (ScaleRule(0.5, text=False), (0, 0)),
        (ScaleRule(0.9995, text=False), (1, 3)),  # of 1024 tokens all are kept
    ],
)
def test_text_stays_where_nothing_stands_for_it(rule, layers):
    with pytest.raises(PlanError, match="text off at scale 9, which it does not prune"):
        make_plan(SQUARE_SMALL, PruningPolicy("p", {9: rule}, *layers, 7), 4)


def test_a_scale_that_is_left_out_has_no_text_to_read():
    policy = PruningPolicy("p", {8: ScaleRule(0.5), 9: ScaleRule(skip=True, text=False)}, 1, 3, 7)
    assert [step.index for step in make_plan(SQUARE_SMALL, policy, 4).steps] == [*range(9)]


def test_families_without_cross_attention_have_no_text_to_leave_out():
    config = next(iter(VAR.transformers.values()))
    policy = PruningPolicy("p", {9: ScaleRule(0.5, text=False)}, 1, 3, 7)
    with pytest.raises(PlanError, match="no cross-attention"):
        VAR.plan(config.schedule, policy, config)


def test_what_a_policy_file_leaves_out_is_left_alone(tmp_path):
    file = tmp_path / "empty.toml"
    file.write_text("")
    assert INFINITY.policy(str(file), SQUARE_SMALL, 4) == PruningPolicy("empty", {}, 0, 0, None, False)
    file.write_text("shared_selection = true\n")
    assert INFINITY.policy(str(file), SQUARE_SMALL, 4).shared_selection is True


@pytest.mark.parametrize(
    ("text", "entry"),
    [("layers = [0, 1.5]", r": layers holds 1\.5"), ('restore_scale = "8"', r": restore_scale holds '8'")],
)
def test_a_wrong_number_is_named(tmp_path, text, entry):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(PlanError, match=entry):
        INFINITY.policy(str(file), SQUARE_SMALL, 4)


def test_a_policy_file_that_cannot_be_read(tmp_path, monkeypatch):
    file = tmp_path / "mine.toml"
    file.touch()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(PlanError, match=r"cannot read policy file .*mine\.toml: Permission denied") as error:
        INFINITY.policy(str(file), SQUARE_SMALL, 4)
    assert error.value.fix


def test_presets_by_name():
    assert INFINITY.policy("dense", SQUARE_1M, 32) is DENSE
    assert INFINITY.policy("fastvar", SQUARE_1M, 32) == fastvar_policy(SQUARE_1M, 32)
    small = schedule_for((256, 256))
    assert [INFINITY.policy(name, small, 8).name for name in PRESETS] == ["dense", "fastvar", "fastvar-strong"]
    assert [INFINITY.policy(name, small, 8).restore_scale for name in PRESETS] == [None, 4, 4]
    with pytest.raises(PlanError, match=r"no policy 'fastvr'\nexpected: " + ", ".join(PRESETS)):
        INFINITY.policy("fastvr", SQUARE_1M, 32)


@pytest.mark.parametrize("policy", [DENSE, fastvar_policy(SQUARE_1M, 32), fastvar_policy(schedule_for((256, 256)), 6)])
def test_a_policy_survives_the_manifest(policy):
    assert policy_from_json(policy_to_json(policy)) == policy


def test_the_strong_preset_keeps_less_and_is_for_small_schedules_alone():
    small = schedule_for((256, 256))
    plans = [make_plan(small, INFINITY.policy(name, small, 8), 8) for name in ("fastvar-strong", "fastvar", "dense")]
    assert [step.kept for step in plans[0].steps] == [1, 4, 16, 36, 64, 144, 64]
    assert [step.guided for step in plans[0].steps] == [True] * 6 + [False]
    shares = [plan.forwarded(2) / plans[-1].forwarded(2) for plan in plans]
    assert [round(share, 2) for share in shares] == [0.64, 0.77, 1.0]
    with pytest.raises(PlanError, match="fastvar tune"):
        INFINITY.policy("fastvar-strong", SQUARE_SMALL, 8)


@st.composite
def _policies(draw: st.DrawFn) -> PruningPolicy:
    rule = st.one_of(
        st.builds(ScaleRule, skip=st.just(True), guidance=st.booleans()),
        st.builds(ScaleRule, st.floats(0.01, 1), guidance=st.booleans()),
    )
    first, stop = sorted(draw(st.tuples(st.integers(0, 32), st.integers(0, 32))))
    rules = draw(st.dictionaries(st.integers(0, 14), rule))
    return PruningPolicy("mine", rules, first, stop, draw(st.none() | st.integers(0, 14)), draw(st.booleans()))


@given(policy=_policies())
def test_a_policy_survives_its_file(policy, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "mine.toml"
    file.write_text(policy_to_toml(policy))
    assert INFINITY.policy(str(file), SQUARE_1M, 32) == policy
    assert policy_from_json(policy_to_json(policy)) == policy


def test_a_policy_file_in_the_words_before_is_read_with_a_warning(tmp_path: Path):
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text("cached_scale = 1\nlayers = [0, 2]\n[scale.2]\nkeep = 0.5\n")
    new.write_text(old.read_text().replace("cached_scale", "restore_scale"))
    schedule = schedule_for((256, 256))
    with pytest.warns(RenamedWarning, match="policy old: cached_scale is named restore_scale now"):
        found = load_policy(str(old), schedule, 2, {})
    assert dataclasses.replace(found, name="new") == load_policy(str(new), schedule, 2, {})
