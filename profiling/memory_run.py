"""Memory over time: a fresh process loads a bundle and draws one image, sampled before and after every launch.

The process is fresh so that the memory measured is that of a program that embeds the runtime.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from ..engines.base import Backend
from ..engines.bundle.bundle import Bundle, Opening
from ..engines.registry import runs_on_host
from ..errors import DeviceMemoryError
from .profiled_bundle import ProfiledBundle
from .records import MemoryEvent, MemoryRun, Request
from .sampler import Sampler, probe_for
from .samples import Probe, Sample, memory_of

LOADING = "loading"
Interval = tuple[str, int | None, Sample, Sample]  # name, scale, sample before, sample after


def memory_run_apart(path: Path, request: Request, opening: Opening | None = None) -> MemoryRun:
    """`memory_run` of the bundle at `path` in a fresh process, which opens the bundle as it is told.

    Raises:
        FastvarError: the error of `memory_run` there.
        DeviceMemoryError: the operating system killed the process.
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
    return "cpu" if runs_on_host(manifest) else "cuda"


Result = TypeVar("Result")


def run_apart(what: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function of a module; `what` names the process in an error. The process ends with the call.

    Raises:
        Exception: whatever stopped it there.
        DeviceMemoryError: the operating system stopped it.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    with _interrupts_blocked():  # it inherits that: Ctrl-C reaches the whole group, and is answered here
        process.start()
    theirs.close()  # so that its end is heard
    try:
        result, failure, where = ours.recv()
    except (EOFError, ConnectionError) as error:
        raise DeviceMemoryError(
            f"the process that {what} was stopped from outside",
            expected="enough memory to load it and to draw one image",
            fix="close what else runs on this machine, or choose a smaller model",
        ) from error
    finally:
        process.kill()
        process.join()
        ours.close()
    if failure is not None:
        raise failure from RuntimeError(f"in the process that {what}:\n{where}")
    found: Result = result
    return found


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer: tuple[Any, Exception | None, str] = (function(*arguments), None, "")
    except Exception as error:  # noqa: BLE001 the caller's to answer
        answer = None, error, traceback.format_exc()
    pipe.send(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
