"""A profile of the tiny bundle against its copy, measured once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastvar.engines.bundle.bundle import Bundle
from fastvar.profiling.profile import profile
from fastvar.profiling.records import Profile, Request

PROMPT = '<b>red</b> & "square"'


@pytest.fixture(scope="session")
def measured(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """Two runs of each."""
    other = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundles") / "other")
    request = Request(PROMPT, seed=3, runs=2, warm_up=1, budget_bytes=64 << 30)
    return profile(Bundle.open(tiny_bundle), request, against=Bundle.open(other))
