"""The GPU path rehearsed: engines compiled for GPUs that are not there, and run on their stand-in. `make test-cuda`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvar.engines.aotinductor import stand_in_gpu
from fastvar.errors import BuildError
from tests.conftest import REPOSITORY

CAPABILITIES = os.environ.get("FASTVAR_CAPABILITIES", "sm86,sm90").split(",")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/cuda/" in item.nodeid:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(scope="session")
def torch_of_cuda() -> Any:
    """A build of torch for CUDA, with which engines are compiled."""
    torch = pytest.importorskip("torch")
    try:
        stand_in_gpu.environment(torch, "sm90")
    except BuildError as error:
        pytest.skip(f"no engine for a GPU can be compiled here: {error.problem}")
    return torch


@pytest.fixture
def on_gpu(torch_of_cuda: Any) -> Callable[..., str]:
    """Run Python code in a process that has a GPU of some generation, as far as it can tell."""

    def run(code: str, *arguments: object, capability: str = "sm90") -> str:
        variables = {**os.environ, **stand_in_gpu.environment(torch_of_cuda, capability)}
        variables["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *sys.path])
        command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def program_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of this run, and of others where FASTVAR_PROGRAM_CACHE names a folder."""
    named = os.environ.get("FASTVAR_PROGRAM_CACHE")
    return Path(named) if named else tmp_path_factory.mktemp("programs")
