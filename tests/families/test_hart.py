"""HART's nouns: sizes, pruning preset, and the rules that go by the scale."""

import json
from dataclasses import replace

import pytest

from fastvar.core.plan import SamplingMode, part_counts
from fastvar.core.policy import DENSE
from fastvar.errors import CheckpointError, PlanError
from fastvar.families.base import to_json
from fastvar.families.hart import (
    HART,
    TRANSFORMERS,
    HartConfig,
    config_from_json,
    diffusion_guidance,
    fastvar_policy,
    guidance_ratio,
    settings_of,
    top_k,
)

PUBLISHED = TRANSFORMERS["hart_0.7b"]
TINY = HartConfig(
    depth=2,
    width=128,
    heads=2,
    mlp_width=256,
    context_length=10,
    context_width=24,
    codes=40,
    code_channels=4,
    scales=(1, 2, 3),
    diffusion_width=32,
    diffusion_depth=1,
)
# As the published program's config.json names them; the released file was not at hand.
SETTINGS = {
    "embed_dim": 1536,
    "depth": 24,
    "num_heads": 24,
    "context_token": 300,
    "context_dim": 1536,
    "mlp_ratio": 4.0,
    "patch_nums": [1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64],
    "attn_type": "llama",
    "mlp_type": "llama",
    "shared_aln": False,
    "disable_aln": True,
    "attn_l2_norm": True,
    "use_timestep_embed": True,
    "use_context_norm": True,
    "sep_aln_pooling_mode": "max",
    "num_sampling_steps": "8",
}


def test_a_published_configuration_is_read():
    """What it does not hold, codes and their channels, the tensors tell."""
    assert HartConfig(**settings_of(SETTINGS), codes=4096, code_channels=32) == PUBLISHED
    assert config_from_json(json.loads(json.dumps(to_json(PUBLISHED)))) == PUBLISHED
    with pytest.raises(CheckpointError, match="not understood"):
        config_from_json({"depth": 2})


@pytest.mark.parametrize(
    "change", [{"shared_aln": True}, {"attn_type": "gpt2"}, {"mlp_type": "gpt2"}, {"use_cross_attn": True}], ids=str
)
def test_a_variant_that_is_not_supported_is_refused(change):
    with pytest.raises(CheckpointError, match="is not supported"):
        settings_of({**SETTINGS, **change})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"heads": 3}, "does not divide"),
        ({"pooling": "sum"}, "pooling"),
        ({"scales": (2, 3)}, "must grow from 1"),
        ({"scales": (1, 3, 3)}, "must grow from 1"),
        ({"diffusion_steps": 0}, "diffusion steps"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(change, problem):
    with pytest.raises(CheckpointError, match=problem):
        replace(TINY, **change)


def test_the_published_policy():
    schedule = HART.schedule_for((1024, 1024), PUBLISHED)
    plan = HART.plan(schedule, fastvar_policy(schedule, 24), PUBLISHED)
    pruned = {step.size: step.kept for step in plan.steps if step.prunes}
    assert pruned == {(48, 48): 1152, (64, 64): 1024}
    assert plan.cached_size == (36, 36)
    assert all(plan.policy.prunes(layer) for layer in range(24))
    assert not fastvar_policy(TINY.schedule, 2).rules
    with pytest.raises(PlanError, match="36x36"):
        fastvar_policy(replace(TINY, scales=(1, 48)).schedule, 2)


def test_rules_that_go_by_the_scale():
    assert [round(guidance_ratio(scale, 14) * 13) for scale in range(14)] == [*range(13), 12]
    assert (top_k(6), top_k(7)) == (600, 300)
    assert (diffusion_guidance(1.0), diffusion_guidance(2.0)) == (0.0, 2.0)


def test_the_prompt_is_the_first_scale():
    plan = HART.plan(TINY.schedule, DENSE, TINY)
    assert [step.tokens for step in plan.steps] == [10, 4, 9]
    assert [step.past_dense for step in plan.steps] == [0, 10, 14]


def test_iterations_of_the_final_scale():
    assert part_counts(36, 1) == (36,)
    assert part_counts(36, 3) == (5, 13, 18)
    plan = HART.plan(TINY.schedule, DENSE, TINY, SamplingMode(final_iterations=3))
    assert [step.tokens for step in plan.steps] == [10, 4, 2, 3, 4]
    with pytest.raises(PlanError, match="10 final iterations"):
        HART.plan(TINY.schedule, DENSE, TINY, SamplingMode(final_iterations=10))
