"""Our operators with their kernels, compiled once per version of their source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastvar.engines.aotinductor.native import build, cpu_lacks
from fastvar.engines.aotinductor.operators import ATTENTION, LINEAR_INT8, WINOGRAD, Operator, register
from fastvar.errors import BuildError

Kernel = Callable[..., Tensor]


@contextmanager
def _compiled(operator: Operator, engine_cache: Path) -> Iterator[Kernel]:
    """The operator; tests are skipped where the CPU lacks its instructions or a C++ compiler is missing."""
    if lacking := cpu_lacks(operator.instructions):
        pytest.skip(f"this CPU lacks {', '.join(lacking)}")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVAR_CACHE", str(engine_cache))
        try:
            build()
        except BuildError as error:
            pytest.skip(error.problem)
        yield register(operator)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def attention(engine_cache: Path) -> Iterator[Kernel]:
    with _compiled(ATTENTION, engine_cache) as operator:
        yield operator


@pytest.fixture(scope="module")
def linear(engine_cache: Path) -> Iterator[Kernel]:
    with _compiled(LINEAR_INT8, engine_cache) as operator:
        yield operator


@pytest.fixture(scope="module")
def winograd(engine_cache: Path) -> Iterator[Kernel]:
    with _compiled(WINOGRAD, engine_cache) as operator:
        yield operator
