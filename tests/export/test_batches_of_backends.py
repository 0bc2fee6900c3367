"""Images of a pass against the same images alone, on compiled engines: the tolerances that the guide states.

`python -m tests.export.batch_equality` runs every case on every backend; what compiles for long is a part of it here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.cache.engine_cache import EngineCache
from fastvar.export.checkpoints.weight_sources import engine_weights
from fastvar.export.describe import assemble_checkpoint
from fastvar.export.factory import EngineFactory
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import toolchain_of
from fastvar.families import FAMILIES
from fastvar.runtime.conditioning import TextFeatures
from fastvar.runtime.session import Session
from tests.export.batch_equality import (
    BATCHES,
    EDITED,
    GUIDANCE_ENDS,
    POLICIES,
    built,
    case_of,
    differences,
    forced_choices,
)
from tests.export.test_batches import features

# Of the largest difference of a logit to the spread of all logits.
FP32, BF16 = 1e-5, 2e-2

KINDS = [(family, policy) for family in FAMILIES for policy in POLICIES]
QUICK = ("infinity", GUIDANCE_ENDS)  # every kind of engine; others take a minute to trace together


@pytest.mark.parametrize(
    ("family", "policy"), [pytest.param(*kind, marks=() if kind == QUICK else pytest.mark.slow) for kind in KINDS]
)
def test_onnxruntime(family: str, policy: str, engine_cache: Path, tmp_path: Path):
    case = case_of(family, policy)
    session = Session(Bundle.open(built(case, tmp_path / "bundle", "onnxruntime", "fp32", engine_cache)))
    found = list(differences(session, case))
    kinds = {(one.guided, one.edited, one.images) for one in found}
    edited = (False, True) if family in EDITED else (False,)
    assert kinds == {(guided, edit, images) for guided in (True, False) for edit in edited for images in BATCHES}
    for one in found:
        assert max(one.largest) <= FP32 * one.spread, one


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", FP32), ("bf16", BF16)])
def test_aotinductor(precision: str, tolerance: float, engine_cache: Path, tmp_path: Path):
    """Dense layers and pruned ones, guidance that ends: two images, drawn and edited."""
    case, options = case_of("infinity", GUIDANCE_ENDS), {"batch": (2,), "guidance": "on"}
    bundle = Bundle.open(built(case, tmp_path / "bundle", "aotinductor", precision, engine_cache, **options))
    assert bundle.manifest.backend == "aotinductor"
    found = list(differences(Session(bundle), case, (2,), (True,)))
    assert [one.edited for one in found] == [False, True]
    for one in found:
        assert max(one.largest) <= tolerance * one.spread, one


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_aotinductor_compiles_the_conditioning_of_every_pass(family: str, engine_cache: Path):
    """What lies image by image is turned to lie token by token: with guidance and without, of one image and of two."""
    case = case_of(family, "dense")
    options = BuildOptions(backend="aotinductor", precision="fp32", batch=(1, 2))
    checkpoint, tools = case.checkpoint(), toolchain_of(options)
    graphs = assemble_checkpoint(checkpoint, case.plan, options).graphs
    chosen = {name: graph for name, graph in graphs.items() if name.startswith("conditioning")}
    assert len(chosen) >= 3, sorted(graphs)  # those of classes are alike for equal numbers of rows
    sources = engine_weights(checkpoint, False, tools.precision)
    made = EngineFactory(tools, EngineCache(engine_cache), sources).make(chosen, done=lambda _: None)
    assert made.keys() == chosen.keys()


def test_numbers_that_are_not_finite_stay_in_their_image(engine_cache: Path, tmp_path: Path):
    """A text of NaN, for one image of four: it alone fails, and the others are what they are alone."""
    case = case_of("infinity", GUIDANCE_ENDS)
    session = Session(Bundle.open(built(case, tmp_path / "bundle", "onnxruntime", "fp32", engine_cache)))
    manifest, broken = session.manifest, 2
    texts = [features(manifest, image) for image in range(4)]
    bad = TextFeatures(texts[broken].cond * np.float32("nan"), texts[broken].uncond, texts[broken].lengths)

    def drawn(images: list[int], texts: list[TextFeatures]) -> tuple[list[np.ndarray], set[int]]:
        workspace = session.workspace(2, len(images))
        workspace.give_features(texts)
        noises = [forced_choices(manifest, image) for image in images]
        steps = workspace.run_scales(noises, [case.settings(image, True) for image in images])
        logits = [workspace.read(calls.sampling_head, "logits").copy() for calls, _ in steps]
        return [found.reshape(-1, len(images), found.shape[-1]) for found in logits], set(workspace.failed)

    logits, failed = drawn([0, 1, 2, 3], [*texts[:broken], bad, *texts[broken + 1 :]])
    assert failed == {broken}
    assert all(np.isnan(scale[:, broken]).any() for scale in logits)
    for image in (0, 1, 3):
        alone, _ = drawn([image], [texts[image]])
        for found, expected in zip(logits, alone, strict=True):
            np.testing.assert_allclose(found[:, image], expected[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "family", ["infinity", *(pytest.param(name, marks=pytest.mark.slow) for name in ("var", "hart"))]
)
def test_tensorrt_rtx_is_built_and_fused(family: str, engine_cache: Path, tmp_path: Path):
    """No GPU runs them here: rows, shapes and attention kernels of passes of two images."""
    pytest.importorskip("tensorrt_rtx")
    case = case_of(family, GUIDANCE_ENDS)
    options = {"batch": (2,), "guidance": "on", "with_encoder": False}
    out = built(case, tmp_path / "bundle", "tensorrt-rtx", "bf16", engine_cache, "sm86", **options)
    manifest = Bundle.open(out).manifest
    assert [own.batch for own in manifest.sets] == [(2, 1), (2, 2)]
    for own in manifest.sets:
        for step, names in zip(manifest.plan.steps, own.steps, strict=True):
            rows = step.rows(own.rows, own.images)
            for name in filter(None, (names.attn_mlp, names.attn_mlp_pruned)):
                spec = manifest.engines[name]
                assert spec.report.kernels > 0
                assert spec.report.fused_attentions == spec.attentions > 0, name
                assert spec.tensor("x_out").shape[0] == step.tokens * rows, name
            logits = manifest.engines[names.sampling_head].tensor("logits")
            assert logits.shape[0] == step.size[0] * step.size[1] * own.images
