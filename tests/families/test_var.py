import json
from dataclasses import asdict

import pytest

from fastvar.core.plan import make_plan
from fastvar.core.policy import DENSE
from fastvar.errors import CheckpointError
from fastvar.families.var import TRANSFORMERS, VAR, VarConfig, fastvar_policy

TINY = VarConfig(depth=2, width=32, heads=2, mlp_width=64, classes=3, codes=12, code_channels=4, scales=(1, 2, 3))


def test_published_models_draw_at_two_sizes():
    assert {name: model.schedule.pixels for name, model in TRANSFORMERS.items()} == {
        **dict.fromkeys(("var_d16", "var_d20", "var_d24", "var_d30"), (256, 256)),
        "var_d36s": (512, 512),
    }
    assert VAR.schedules(TRANSFORMERS["var_d16"])[256, 256].rope_grid == (16, 16)
    assert [TRANSFORMERS[name].tokens for name in ("var_d30", "var_d36s")] == [680, 2240]


def test_scales_begin_behind_one_another():
    assert [TINY.first_token(scale) for scale in range(4)] == [0, 1, 5, 14]
    assert TINY.tokens == 14


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        ({"heads": 3}, "3 attention heads"),
        ({"scales": (2, 3)}, r"scales \[2, 3\]"),
        ({"scales": (1, 3, 2)}, r"scales \[1, 3, 2\]"),
        ({"scales": ()}, r"scales \[\]"),
        ({"classes": 0}, "not positive"),
    ],
)
def test_impossible_sizes_are_refused(field: dict[str, object], problem: str):
    with pytest.raises(CheckpointError, match=problem):
        VarConfig(**{**asdict(TINY), **field})


def test_a_configuration_survives_json():
    assert VAR.transformer_from_json(json.loads(json.dumps(asdict(TINY)))) == TINY
    with pytest.raises(CheckpointError, match="text_width"):
        VAR.transformer_from_json({**asdict(TINY), "text_width": 5})


def test_the_preset_prunes_the_last_two_scales_behind_the_first_two_layers():
    model = TRANSFORMERS["var_d36s"]
    plan = make_plan(model.schedule, fastvar_policy(model.schedule, model.depth), model.depth)
    assert [step.kept for step in plan.steps[-3:]] == [18 * 18, 24 * 24 // 2, 32 * 32 // 4]
    assert plan.cached_size == (18, 18)
    dense = make_plan(model.schedule, DENSE, model.depth).capacity(0)
    assert plan.capacity(2) == plan.capacity(35) < plan.capacity(1) == dense


def test_the_preset_prunes_nothing_of_a_schedule_too_short_for_it():
    assert make_plan(TINY.schedule, fastvar_policy(TINY.schedule, 2), 2).cached_size is None
