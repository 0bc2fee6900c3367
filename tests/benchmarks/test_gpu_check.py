"""The checklist on a machine without a GPU: that it says so, and that its parts measure what they claim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import Builder, attempt, built_target, parity, relative_error
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.tensorrt.cuda_device import GpuFacts
from fastvar.export.rebuild import rebuild
from tests.conftest import TINY_POLICY

ROOT = Path(__file__).parents[2]
NO_GPU = not Path("/proc/driver/nvidia/version").exists()


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert "NVIDIA" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


class Ready(Builder):
    """Has built already what it is asked for: a bundle for the CPU, and perhaps one for the GPU."""

    def __init__(self, cpu: Path, gpu: Path | None = None, folder: Path = Path(), target: str = "cpu") -> None:
        super().__init__(folder, "onnxruntime", target)
        self._cpu, self._gpu = cpu, gpu

    def cpu(self, name: str, *arguments: str) -> Bundle:
        return Bundle.open(self._cpu)

    def gpu(self, name: str, *arguments: str) -> Bundle:
        return super().gpu(name, *arguments) if self._gpu is None else Bundle.open(self._gpu)


def test_parity_of_a_tiny_model(tiny_bundle: Path, engine_cache: Path, tmp_path: Path, monkeypatch):
    """With itself, and with a pruning of its last scale that is another."""
    monkeypatch.setitem(gpu_check.TOLERANCES, "fp32", 1e-6)
    found = parity(Ready(tiny_bundle, tiny_bundle), "fp32")
    assert (found["ok"], found["logits_relative_error"], found["image_relative_error"]) == (True, [0.0] * 3, 0.0)
    (tmp_path / "other.toml").write_text(TINY_POLICY.replace("keep = 0.5", "keep = 0.25"))
    rebuild(tiny_bundle, tmp_path / "other", policy=str(tmp_path / "other.toml"), cache=engine_cache)
    found = parity(Ready(tiny_bundle, tmp_path / "other"), "fp32")
    assert not found["ok"]
    assert [error > 1e-6 for error in found["logits_relative_error"]] == [False, False, True]


@pytest.fixture
def stand_in(tmp_path: Path, engine_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """Builds for onnxruntime what is meant for the GPU."""
    monkeypatch.setenv("FASTVAR_CACHE", str(engine_cache))
    monkeypatch.setitem(gpu_check.TOLERANCES, "fp32", 1e-6)
    return Builder(tmp_path, "onnxruntime", "cpu")


@pytest.mark.slow
def test_parity_compares_every_scale(stand_in: Builder):
    found = parity(stand_in, "fp32")
    assert found["ok"], found
    assert found["logits_relative_error"] == [0.0] * 7, "the same engines"


@pytest.mark.slow
def test_parity_sees_an_error(stand_in: Builder, monkeypatch: pytest.MonkeyPatch):
    """The other side is pruned in its last scale, this one is not."""
    build = stand_in.gpu
    monkeypatch.setattr(stand_in, "gpu", lambda name, *arguments: build(name, *arguments, "--policy", "dense"))
    found = parity(stand_in, "fp32")
    assert not found["ok"]
    assert [error > 1e-6 for error in found["logits_relative_error"]] == [False] * 6 + [True]


def test_what_stops_a_section_is_recorded(tiny_bundle: Path, tmp_path: Path):
    found = attempt(lambda: parity(Ready(tiny_bundle, folder=tmp_path, target="sm86"), "fp32"))
    assert not found["ok"]
    assert "does not build for target 'sm86'" in found["error"]


@pytest.mark.parametrize(("capability", "target"), [("sm86", "sm86"), ("sm90", "any")])
def test_gpus_that_the_library_does_not_list_get_the_default_mask(capability: str, target: str):
    pytest.importorskip("tensorrt_rtx")
    assert built_target("tensorrt-rtx", GpuFacts("some GPU", capability, (13, 0), 0)) == target


def test_relative_error():
    assert relative_error(np.array([1.0, 1.1]), np.array([1.0, 1.0])) == pytest.approx(0.1 / np.sqrt(2))
