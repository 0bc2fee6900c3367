"""docs/adding-a-backend.md, followed: a class behind a line of the registry is all that a backend takes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import fastvar
from fastvar import doctor
from fastvar.engines import registry
from fastvar.engines.bundle import manifest_checks
from tests.fakes import reference_backend


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference evaluator as a backend, as if its folder and its line were there."""
    name = reference_backend.ReferenceBackend.name
    monkeypatch.setitem(sys.modules, f"fastvar.engines.{name}.backend", reference_backend)
    monkeypatch.setitem(registry._BACKENDS, name, (f"{name}.backend", "ReferenceBackend"))
    monkeypatch.setattr(manifest_checks, "BACKEND_NAMES", tuple(registry._BACKENDS))
    return name


def drawn(bundle: Path) -> np.ndarray:
    with fastvar.Pipeline.load(bundle) as pipe:
        return np.asarray(pipe("a red circle", seed=7).images[0]).astype(int)


def test_it_builds_and_draws_the_image_of_others(
    added, tiny_checkpoint, tiny_policy, tiny_bundle, engine_cache, tmp_path
):
    options = fastvar.BuildOptions(size="256x256", policy=str(tiny_policy), backend=added)
    fastvar.build(tiny_checkpoint, out=tmp_path / "bundle", options=options, cache=engine_cache)
    found, expected = drawn(tmp_path / "bundle"), drawn(tiny_bundle)
    assert np.abs(found - expected).max() <= 1  # another order of sums may round a level otherwise
    assert (found != expected).mean() < 1e-3
    assert found.std() > 10


def test_commands_know_it(added, run, tiny_checkpoint_folder):
    found = doctor._of_backend(added)
    assert (found.use, found.extra, found.packages) == ("backend reference", "export", (("onnx",),))
    code, out, err = run("plan", tiny_checkpoint_folder, "--size", "256x256", "--backend", added)
    assert (code, err) == (0, "")
    assert "this machine's memory" in out
    code, _, err = run("build", tiny_checkpoint_folder, "--backend", added, "--precision", "bf16", "--out", "bundle")
    assert code == 2
    assert "reference does not compute in bfloat16" in err
