"""Ray is no part of the usual environment: `make test-ray` makes one, and runs these alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A cluster of this machine, of two CPUs; tried twice, for a busy machine may be too slow to start one."""
    import ray

    options: dict[str, Any] = {"address": "local", "num_cpus": 2, "include_dashboard": False, "log_to_driver": False}
    try:
        ray.init(**options)
    except RuntimeError:
        ray.shutdown()
        ray.init(**options)
    yield ray
    ray.shutdown()
