"""Memory over time: a bundle is loaded and draws its first image launch by launch, sampled in step with them.

In a process of its own: what is seen is what a program that embeds the runtime takes, and no other bundle's leavings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..engines.base import Backend
from ..engines.bundle import Bundle, Opening
from ..engines.registry import backend_class
from .apart import run_apart
from .records import MemoryEvent, MemoryRun, Request
from .sampler import Probe, Sample, Sampler, memory_of, probe_for
from .subject import Subject

LOADING = "loading"


@dataclass(frozen=True)
class _Interval:
    """Between two samples."""

    name: str
    scale: int | None
    before: Sample
    after: Sample


def memory_run_apart(path: Path, request: Request, opening: Opening | None = None) -> MemoryRun:
    """`memory_run` in a fresh process, which opens the bundle as it is told.

    Raises:
        FastvarError: whatever stopped it there, told in one piece.
        DeviceMemoryError: the operating system stopped it.
    """
    told = () if opening is None else (opening,)
    return run_apart(f"loaded {path}", _open_and_run, path, request, *told)


def _open_and_run(path: Path, request: Request, opening: Opening | None = None) -> MemoryRun:
    return memory_run(Bundle.open_with(path, opening or Opening()), request)


def memory_run(
    bundle: Bundle, request: Request, *, backend: Backend | None = None, probe: Probe | None = None
) -> MemoryRun:
    """Load a bundle and draw one image.

    Raises:
        BackendError: a GPU bundle, and NVML or the driver is missing.
    """
    with Sampler(probe or probe_for(device_kind(bundle)), budget_bytes=request.budget_bytes) as sampler:
        intervals = list(_intervals(bundle, request, backend, sampler))
    recording = sampler.recording
    memory = dict(zip((s.time_s for s in recording.samples), memory_of(recording.samples), strict=True))
    loading, *launches = (
        MemoryEvent(i.name, i.scale, i.before.time_s, i.after.time_s, memory[i.before.time_s], memory[i.after.time_s])
        for i in intervals
    )
    return MemoryRun(recording, loading, tuple(launches))


def _intervals(bundle: Bundle, request: Request, backend: Backend | None, sampler: Sampler) -> Iterator[_Interval]:
    before = sampler.sample()
    subject = Subject(bundle, request, backend)
    after = sampler.sample()
    yield _Interval(LOADING, None, before, after)
    for step, call, _ in subject.launches():
        before, after = after, sampler.sample()
        yield _Interval(call.engine, None if step is None else step.step.index, before, after)


def device_kind(bundle: Bundle) -> str:
    """Where a bundle's engines run: "cpu" or "cuda". Needs no driver: memory is watched from before it starts."""
    manifest = bundle.manifest
    return "cpu" if backend_class(manifest.backend).runs_on_host(manifest.target) else "cuda"
