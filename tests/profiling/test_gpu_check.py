"""The checklist on a machine without a GPU: that it says so, and that its parts measure what they claim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvar.engines.cuda import GpuFacts
from fastvar.profiling import gpu_check
from fastvar.profiling.gpu_check import Builder, attempt, built_target, parity, relative_error

ROOT = Path(__file__).parents[2]
NO_GPU = not Path("/proc/driver/nvidia/version").exists()


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "fastvar.profiling.gpu_check"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert "NVIDIA" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def stand_in(tmp_path: Path, engine_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """Builds for onnxruntime what is meant for the GPU."""
    monkeypatch.setenv("FASTVAR_CACHE", str(engine_cache))
    monkeypatch.setitem(gpu_check.TOLERANCES, "fp32", 1e-6)
    return Builder(tmp_path, "onnxruntime", "cpu")


def test_parity_compares_every_scale(stand_in: Builder):
    found = parity(stand_in, "fp32")
    assert found["ok"], found
    assert found["logits_relative_error"] == [0.0] * 7, "the same engines"


def test_parity_sees_an_error(stand_in: Builder, monkeypatch: pytest.MonkeyPatch):
    """The other side is pruned in its last scale, this one is not."""
    build = stand_in.gpu
    monkeypatch.setattr(stand_in, "gpu", lambda name, *arguments: build(name, *arguments, "--policy", "dense"))
    found = parity(stand_in, "fp32")
    assert not found["ok"]
    assert [error > 1e-6 for error in found["logits_relative_error"]] == [False] * 6 + [True]


def test_what_stops_a_section_is_recorded(stand_in: Builder, tmp_path: Path):
    found = attempt(lambda: parity(Builder(tmp_path, "onnxruntime", "sm86"), "fp32"))
    assert not found["ok"]
    assert "does not build for target 'sm86'" in found["error"]


@pytest.mark.parametrize(("capability", "target"), [("sm86", "sm86"), ("sm90", "any")])
def test_gpus_that_the_library_does_not_list_get_the_default_mask(capability: str, target: str):
    pytest.importorskip("tensorrt_rtx")
    assert built_target("tensorrt-rtx", GpuFacts("some GPU", capability, (13, 0), 0)) == target


def test_relative_error():
    assert relative_error(np.array([1.0, 1.1]), np.array([1.0, 1.0])) == pytest.approx(0.1 / np.sqrt(2))
