"""The process that rebuilds: same bundles, errors that come through, and an end."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import BuildError
from fastvar.export.rebuild import rebuild
from fastvar.profiling.tuning.rebuilder import Rebuilder

SKIPPED = {i: ScaleRule(skip=True) for i in (1, 3, 4, 5)}
OTHER = PruningPolicy("other", {**SKIPPED, 6: ScaleRule(0.25)}, 1, 2, 2)
IMPOSSIBLE = PruningPolicy("impossible", {6: ScaleRule(0.25)}, 1, 2, None)


def test_it_builds_what_rebuild_builds_and_survives_errors(tiny_bundle: Path, engine_cache: Path, tmp_path: Path):
    rebuild(tiny_bundle, tmp_path / "here", policy=OTHER, cache=engine_cache)
    with Rebuilder(tiny_bundle, tmp_path / "there", cache=engine_cache) as rebuilder:
        with pytest.raises(BuildError, match="restore scale is None\nexpected: an executed scale"):
            rebuilder.build(IMPOSSIBLE)
        found = rebuilder.build(OTHER)
        assert rebuilder.build(OTHER) == found
        process = rebuilder._process
        assert process is not None
    assert Bundle.open(found, verify="all").digest == Bundle.open(tmp_path / "here").digest
    assert process.poll() is not None


def test_a_process_that_dies_is_told(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Rebuilder(tiny_bundle, tmp_path) as rebuilder, pytest.raises(BuildError, match="'other' died with code 1"):
        rebuilder.build(OTHER)


def test_asking_imports_no_torch():
    code = (
        "import fastvar.profiling.tuning.rebuilder, fastvar.profiling.tuning.trials, sys; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
