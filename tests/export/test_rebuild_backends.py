"""A bundle of every backend is rebuilt from itself, by the command, with nothing from the cache: engines that take and
give the same, and the same images where they run here.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

import fastvar
from fastvar import Pipeline
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.registry import BACKEND_NAMES, get_backend, runs_on_host
from fastvar.errors import BackendError

TARGETS = {"tensorrt-rtx": "sm86"}  # a GPU by name: engines for it are made anywhere
# A C++ compiler makes every program twice; the datacentre library builds on the GPU that it builds for.
MARKS = {"aotinductor": pytest.mark.slow, "tensorrt": pytest.mark.gpu}


def require(backend: str) -> None:
    """Skip where the library is not installed."""
    try:
        get_backend(backend).version()
    except BackendError as error:
        pytest.skip(error.problem)


@pytest.mark.parametrize("backend", [pytest.param(name, marks=MARKS.get(name, ())) for name in BACKEND_NAMES])
def test_it_is_rebuilt_from_itself(
    backend: str, tiny_checkpoint, tiny_policy: Path, engine_cache: Path, tmp_path: Path, run
):
    require(backend)
    source, out = tmp_path / "source", tmp_path / "rebuilt"
    options = {"size": "256x256", "policy": str(tiny_policy), "guidance": "on", "target": TARGETS.get(backend)}
    fastvar.build(tiny_checkpoint, out=source, backend=backend, cache=engine_cache, **options)
    rebuilt = ("build", "--from-bundle", source, "--out", out, "--policy", tiny_policy, "--no-cache")
    code, told, err = run(*rebuilt)
    assert code == 0, err
    assert "0 engines from the cache" in told + err
    before, after = (Bundle.open(path, verify="all").manifest for path in (source, out))
    assert (after.plan, after.sets, after.precision, after.precision_choice, after.target) == (
        before.plan,
        before.sets,
        before.precision,
        before.precision_choice,
        before.target,
    )
    assert {name: (e.inputs, e.outputs, e.weights, e.report) for name, e in after.engines.items()} == {
        name: (e.inputs, e.outputs, e.weights, e.report) for name, e in before.engines.items()
    }
    if runs_on_host(before):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            images = [np.asarray(Pipeline.load(path, threads=1)("red", seed=3).images[0]) for path in (source, out)]
        np.testing.assert_array_equal(*images)
        assert images[0].std() > 0
