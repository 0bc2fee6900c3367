"""Ray is no part of the usual environment: `make test-ray` makes one, and runs these alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What processes of Ray inherit. What they import of the tests is found wherever they are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        patch.setenv("PACED", str(tmp_path_factory.mktemp("paced")))
        yield


@pytest.fixture(scope="session")
def cluster(surroundings) -> Iterator[Any]:
    """A cluster of this machine, of four CPUs, it believes; tried twice: a busy machine may be too slow."""
    import ray

    options: dict[str, Any] = {"address": "local", "num_cpus": 4, "include_dashboard": False, "log_to_driver": False}
    options |= {"runtime_env": {"worker_process_setup_hook": "tests.ray.paced.install"}}
    try:
        ray.init(**options)
    except RuntimeError:
        ray.shutdown()
        ray.init(**options)
    yield ray
    ray.shutdown()
