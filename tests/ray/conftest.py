"""Ray is no part of the usual environment: `make test-ray` makes one, and runs these alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")
# What workers import of the tests lies here: they find it wherever they are started.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
os.environ.setdefault("PACED", tempfile.mkdtemp())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
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
