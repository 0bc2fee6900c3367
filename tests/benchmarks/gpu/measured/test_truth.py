"""Truth measured on a machine without a GPU: the parts of the day that compare measure what they claim."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.builder import DEMO, Builder
from benchmarks.gpu import drawing
from benchmarks.gpu.drawing import contender_of, forced, parity, relative_error
from benchmarks.gpu.identity import Identity
from benchmarks.gpu.journal import Journal, Measuring
from benchmarks.gpu.measured import truth
from benchmarks.gpu.measured.tensorrt import built_target
from benchmarks.gpu.sections import BUNDLES, Context
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.options import BuildOptions
from fastvar.export.rebuild import rebuild
from tests.conftest import TINY_POLICY
from tests.models import tiny_hart


def test_parity_of_a_tiny_model(tiny_bundle: Path, engine_cache: Path, tmp_path: Path, monkeypatch):
    """With itself, and with a pruning of its last scale that is another."""
    monkeypatch.setitem(drawing.TOLERANCES, "fp32", 1e-6)
    expected = forced(Bundle.open(tiny_bundle))
    found = parity(expected, forced(Bundle.open(tiny_bundle)), "fp32")
    assert (found["ok"], found["logits_relative_error"], found["image_relative_error"]) == (True, [0.0] * 3, 0.0)
    (tmp_path / "other.toml").write_text(TINY_POLICY.replace("keep = 0.5", "keep = 0.25"))
    rebuild(tiny_bundle, tmp_path / "other", policy=str(tmp_path / "other.toml"), cache=engine_cache)
    found = parity(expected, forced(Bundle.open(tmp_path / "other")), "fp32")
    assert not found["ok"]
    assert [error > 1e-6 for error in found["logits_relative_error"]] == [False, False, True]


@pytest.fixture
def stand_in(tmp_path: Path, engine_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """Builds for onnxruntime what is meant for the GPU."""
    monkeypatch.setenv("FASTVAR_CACHE", str(engine_cache))
    monkeypatch.setitem(drawing.TOLERANCES, "fp32", 1e-6)
    return Builder(tmp_path, "onnxruntime", "cpu")


@pytest.mark.slow
def test_parity_compares_every_scale_and_sees_an_error(stand_in: Builder):
    """The same engines; then one side is pruned in its last scale, the other is not."""
    expected = forced(stand_in.cpu("cpu", *DEMO))
    found = parity(expected, forced(stand_in.gpu("gpu", *DEMO)), "fp32")
    assert found["ok"], found
    assert found["logits_relative_error"] == [0.0] * 7, "the same engines"
    found = parity(expected, forced(stand_in.gpu("dense", *DEMO, "--policy", "dense")), "fp32")
    assert not found["ok"]
    assert [error > 1e-6 for error in found["logits_relative_error"]] == [False] * 6 + [True]


@pytest.mark.slow
def test_forced_codes_of_another_family(tmp_path: Path, engine_cache: Path):
    """HART: what is drawn does not depend on what is sampled, and so not on the engine's rounding."""
    checkpoint = random_checkpoint_for(tiny_hart.CONFIG, tiny_hart.TOKENIZER)
    plan = checkpoint.family.plan(tiny_hart.CONFIG.schedule, tiny_hart.PRUNED, tiny_hart.CONFIG, None)
    build_bundle(checkpoint, plan, tmp_path / "hart", BuildOptions(guidance="on"), cache=engine_cache)
    bundle = Bundle.open(tmp_path / "hart")
    first, again = forced(bundle), forced(bundle)
    assert len(first.logits) == len(plan.steps)
    assert all(np.array_equal(*pair) for pair in zip(first.logits, again.logits, strict=True))
    assert np.array_equal(first.image, again.image)
    assert np.isfinite(first.image).all()
    assert contender_of(bundle).scales(lambda *_: np.float32(0.5))


def test_what_stops_a_measurement_is_recorded_and_the_next_goes_on(tiny_bundle: Path, tmp_path: Path):
    """There is a bundle of one precision alone."""
    folder = tmp_path / BUNDLES
    folder.mkdir()
    for name in ("demo-cpu", "demo-fp16"):
        (folder / name).symlink_to(tiny_bundle)
    log = Measuring(Journal(tmp_path / "journal.jsonl"), "truth", "d", [])
    truth.measure(Context(tmp_path, Identity("a GPU", "sm90", "", False, "tiny"), log))
    assert log.failed == ["bf16, graphs off", "bf16, graphs on"]
    lines = {line["name"]: line for line in log.journal.lines()}
    assert "demo-bf16" in lines["bf16, graphs off"]["error"]
    assert lines["fp16, graphs on"]["values"]["ok"]


@pytest.mark.parametrize(("capability", "target"), [("sm86", "sm86"), ("sm90", "any")])
def test_gpus_that_the_library_does_not_list_get_the_default_mask(capability: str, target: str):
    pytest.importorskip("tensorrt_rtx")
    assert built_target("tensorrt-rtx", capability) == target


def test_relative_error():
    assert relative_error(np.array([1.0, 1.1]), np.array([1.0, 1.0])) == pytest.approx(0.1 / np.sqrt(2))
