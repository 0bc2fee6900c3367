"""Memory over time: a fresh process loads a bundle and draws one image, sampled before and after every launch.

The process is fresh so that the memory measured is that of a program that embeds the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

from ..engines.base import Backend
from ..engines.bundle import Bundle
from ..engines.registry import backend_class
from ..errors import DeviceMemoryError
from .records import MemoryEvent, MemoryRun, Request
from .sampler import Sampler, probe_for
from .samples import Probe, Sample, memory_of
from .subject import ProfiledBundle

LOADING = "loading"
Result = TypeVar("Result")
Interval = tuple[str, int | None, Sample, Sample]  # name, scale, sample before, sample after


def run_apart(what: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a module-level function in a fresh process; `what` describes the process in an error.

    Raises:
        Exception: the exception of the function.
        DeviceMemoryError: the operating system killed the process.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise DeviceMemoryError(
                f"the process that {what} was stopped from outside",
                expected="enough memory to load it and to draw one image",
                fix="close what else runs on this machine, or choose a smaller model",
            ) from error


def memory_run_apart(path: Path, request: Request) -> MemoryRun:
    """`memory_run` of the bundle at `path` in a fresh process.

    Raises:
        FastvarError: the error of `memory_run` there.
        DeviceMemoryError: the operating system killed the process.
    """
    return run_apart(f"loaded {path}", _open_and_run, path, request)


def _open_and_run(path: Path, request: Request) -> MemoryRun:
    return memory_run(Bundle.open(path), request)


def memory_run(
    bundle: Bundle, request: Request, *, backend: Backend | None = None, probe: Probe | None = None
) -> MemoryRun:
    """Load a bundle and draw one image.

    Raises:
        BackendError: the bundle is for a GPU, and NVML or the driver is missing.
    """
    with Sampler(probe or probe_for(device_kind(bundle)), budget_bytes=request.budget_bytes) as sampler:
        intervals = list(_intervals(bundle, request, backend, sampler))
    recording = sampler.recording
    memory = dict(zip((s.time_s for s in recording.samples), memory_of(recording.samples), strict=True))
    loading, *launches = (
        MemoryEvent(name, scale, before.time_s, after.time_s, memory[before.time_s], memory[after.time_s])
        for name, scale, before, after in intervals
    )
    return MemoryRun(recording, loading, tuple(launches))


def _intervals(bundle: Bundle, request: Request, backend: Backend | None, sampler: Sampler) -> Iterator[Interval]:
    before = sampler.sample()
    profiled = ProfiledBundle(bundle, request, backend)
    after = sampler.sample()
    yield LOADING, None, before, after
    for step, call, _ in profiled.launches():
        before, after = after, sampler.sample()
        yield call.engine, None if step is None else step.step.index, before, after


def device_kind(bundle: Bundle) -> str:
    """The device of a bundle's engines, "cpu" or "cuda". Needs no driver."""
    manifest = bundle.manifest
    return "cpu" if backend_class(manifest.backend).runs_on_host(manifest.target) else "cuda"
