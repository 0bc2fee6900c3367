"""config.json beside a transformer: names, types, contradictions, and what the tensors leave open."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.errors import CheckpointError, RenamedWarning
from fastvar.families import FAMILIES
from fastvar.families.base import to_json
from fastvar.families.hart import HART
from fastvar.families.hart import TRANSFORMERS as HARTS
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity import TRANSFORMERS as INFINITIES
from fastvar.families.settings import completed
from fastvar.families.var import TRANSFORMERS as VARS
from fastvar.families.var import VAR, VarConfig

ODD: list[Any] = [None, True, "4", "", 4.5, -1, 0, [], [1], ["a"], {}, {"a": 1}, 10**40, math.nan, math.inf, [1, [2]]]
D16 = VARS["var_d16"]
# As upstream's constructors name them.
VAR_D16 = {"depth": 16, "embed_dim": 1024, "num_heads": 16, "mlp_ratio": 4, "num_classes": 1000, "shared_aln": False}
VAR_D16 |= {"attn_l2_norm": True, "patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], "norm_eps": 1e-6, "drop_rate": 0.0}


@pytest.mark.parametrize("name", [*VARS, *HARTS, *INFINITIES])
def test_whole_configurations_under_our_names(name: str):
    (family,) = (f for f in FAMILIES.values() if name in f.transformers)
    config = family.transformers[name]
    data = json.loads(json.dumps(to_json(config)))
    assert family.transformer_from_json(data) == config
    assert family.settings_from_json(data) == {n: getattr(config, n) for n in data}


def test_names_of_the_published_program():
    found = VAR.settings_from_json(VAR_D16)
    assert found == {n: value for n, value in vars(D16).items() if n not in ("codes", "code_channels")}
    assert VAR.settings_from_json({"num_heads": 4}) == VAR.settings_from_json({"heads": 4}) == {"heads": 4}
    assert VAR.settings_from_json({"mlp_ratio": 4.0}) == {}, "without a width the tensors tell"
    assert HART.settings_from_json({"num_sampling_steps": "4", "disable_aln": True}) == {
        "diffusion_steps": 4,
        "modulated": False,
    }
    assert INFINITY.settings_from_json({"apply_spatial_patchify": 1}) == {"spatial_patchify": True}


def test_a_name_of_ours_from_before_is_read_with_a_warning():
    with pytest.warns(RenamedWarning, match=r"config\.json: levels is named max_scales now"):
        assert INFINITY.settings_from_json({"levels": 9}) == {"max_scales": 9}


def test_what_says_nothing_of_a_model_may_stand_there():
    assert VAR.settings_from_json({"architectures": ["VAR"], "torch_dtype": "float32", "drop_path_rate": 0.1}) == {}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
def test_unknown_entries_are_refused_with_the_known_ones_named(family):
    for name in ("head", "scale", "hidden_size", "Heads"):
        with pytest.raises(CheckpointError, match=rf"entry '{name}', which is not known\nexpected: .*heads.*num_heads"):
            family.settings_from_json({"depth": 2, name: 4})


def test_two_names_of_one_setting_must_agree():
    assert VAR.settings_from_json({"heads": 4, "num_heads": 4}) == {"heads": 4}
    with pytest.raises(CheckpointError, match="heads 4 and 8"):
        VAR.settings_from_json({"heads": 4, "num_heads": 8})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("heads", "4", "a whole number"),
        ("heads", 4.0, "a whole number"),
        ("heads", True, "a whole number"),
        ("scales", 5, r"\[1, 2, \.\.\.\]"),
        ("scales", [1, "2"], r"\[1, 2, \.\.\.\]"),
        ("patch_nums", [1, [2]], r"\[1, 2, \.\.\.\]"),
        ("unit_queries", 1, "true or false"),
        ("attn_l2_norm", "yes", "true or false"),
        ("mlp_ratio", "4", "a number"),
        ("mlp_ratio", math.nan, "a number"),
    ],
)
def test_wrong_types_are_told(name: str, value: Any, expected: str):
    with pytest.raises(CheckpointError, match=f"says {name} .*\nexpected: {expected}"):
        VAR.settings_from_json({name: value})


def test_variants_that_are_not_supported_are_told():
    for family, entry in (
        (VAR, {"norm_eps": 1e-5}),
        (HART, {"context_norm_scale": 2.0}),
        (INFINITY, {"head_depth": 2}),
    ):
        with pytest.raises(CheckpointError, match=f"{next(iter(entry))}=.* is not supported"):
            family.settings_from_json(entry)


def test_what_neither_tensors_nor_settings_say_is_asked_for_or_published():
    read = {n: value for n, value in vars(D16).items() if n != "scales"}
    assert completed(VarConfig, read, {}, VARS) == D16
    assert completed(VarConfig, read, {"scales": (1, 2)}, VARS).scales == (1, 2)
    with pytest.raises(CheckpointError, match=r'do not say its scales[\s\S]*\{"scales": \[1, 2, \.\.\.\]\} in config'):
        completed(VarConfig, {**read, "classes": 7}, {}, VARS)
    with pytest.raises(CheckpointError, match="tensors have depth 16, its configuration says 12"):
        completed(VarConfig, read, {"depth": 12}, VARS)


entries = st.dictionaries(
    st.sampled_from(sorted({*vars(D16), *VAR_D16, "context_token", "num_sampling_steps", "disable_aln", "patch_nums"}))
    | st.text(max_size=5),
    st.sampled_from(ODD) | st.recursive(st.integers() | st.text(max_size=4) | st.floats(), st.lists, max_leaves=4),
    max_size=5,
)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda f: f.name)
@settings(max_examples=200, deadline=None)
@given(data=entries)
def test_no_content_raises_anything_else(family, data):
    try:
        found = family.settings_from_json(data)
        family.transformer_from_json({**to_json(next(iter(family.transformers.values()))), **to_json_like(found)})
    except CheckpointError:
        return


def to_json_like(found: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
