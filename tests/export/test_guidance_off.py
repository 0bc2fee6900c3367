"""Guidance switched off at the late scales, through real engines, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvar.core.plan import Batch
from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.assembly import assemble
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.factory import EngineFactory
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import make_toolchain
from fastvar.families.infinity import ImageTokenizerConfig
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from tests.models import tiny_models as tiny

CONFIG = replace(tiny.CONFIG, width=64, heads=2)  # a token's keys take 256 bytes, as TensorRT wants them
IMAGES = ImageTokenizerConfig(bits=6, base_channels=24, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=0)
# Behind the restore scale a dense one without guidance and a pruned one, which finds keys of one row and of two.
# The last scale's pruned layers do not read the text either.
RULES = {**dict.fromkeys((1, 3, 4), ScaleRule(skip=True)), 6: ScaleRule(0.25, text=False)}
PLAN = tiny.plan(tiny.without_guidance(PruningPolicy("late", RULES, 1, 3, 2), 5))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    made = random_checkpoint_for(CONFIG, IMAGES, name="tiny")
    return replace(made, transformer_weights=dict(tiny.model(CONFIG).state_dict()))


@pytest.fixture(scope="module")
def bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> Bundle:
    out = tmp_path_factory.mktemp("unguided") / "bundle"
    build_bundle(checkpoint, PLAN, out, BuildOptions(guidance="on"), cache=engine_cache)
    return Bundle.open(out)


def test_engines_equal_the_reference(bundle: Bundle):
    model, (features, mask) = tiny.model(CONFIG), tiny.text(CONFIG, lengths=(5, 8))
    trace = generate_scales(model, features, mask, PLAN, tiny.noise, Sampling(guidance_scale=3.0, tau=0.7))
    workspace = Session(bundle).workspace(2)
    workspace.set_features(features[0].numpy(), features[1].numpy(), (5, 8))
    steps = workspace.run_scales(lambda *a: tiny.noise(*a).numpy(), SamplingSettings(3.0, 0.7, 0.97))
    for (calls, _), expected in zip(steps, trace, strict=True):
        logits = torch.from_numpy(workspace.read(calls.sampling_head, "logits"))
        torch.testing.assert_close(logits, expected.logits, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(workspace.summed_codes(calls), expected.summed_codes[0], atol=1e-5)


def test_the_manifest_brings_the_plan_back(bundle: Bundle):
    assert [step.guided for step in bundle.manifest.plan.steps] == [True, True, False, False]
    assert bundle.manifest.plan == PLAN


def test_without_guidance_nothing_is_left_to_switch_off():
    """One row runs the engines that a plan with guidance throughout would."""
    guided = tiny.plan(PruningPolicy("late", RULES, 1, 3, 2))
    sets = [assemble(plan, CONFIG, IMAGES, None, CONFIG.text_length, [Batch(1)]).sets for plan in (PLAN, guided)]
    assert sets[0] == sets[1]


def test_every_attention_over_two_kinds_of_keys_is_one_kernel_on_a_gpu(checkpoint: Checkpoint):
    pytest.importorskip("tensorrt_rtx")
    graphs = assemble(PLAN, CONFIG, IMAGES, None, CONFIG.text_length, [Batch(2)]).graphs
    mixed = [graph for graph in graphs.values() if graph.arguments.get("guided_past")]
    assert len(mixed) == 3  # dense at the first of two scales, where layers that prune have cached as much as others
    sources = transformer_weights(CONFIG, checkpoint.transformer_weights)
    built = EngineFactory(make_toolchain("tensorrt-rtx", "sm86"), None, sources, 1).make(
        {graph.name: graph for graph in mixed[-2:]}, lambda _: None
    )
    assert [engine.engine.report.fused_attentions for engine in built.values()] == [2, 1]  # the last reads no text
