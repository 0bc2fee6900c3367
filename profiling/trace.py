"""A profile as a Chrome trace (Trace Event Format), for Perfetto or chrome://tracing.

Each bundle has up to three processes: whole images (medians end to end), launches (medians end to end), and the memory
run with counters, on its own clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .records import BundleProfile, MemoryRun, Profile
from .samples import Recording, memory_of

Event = dict[str, Any]
TRACKS = ("whole images", "launch by launch", "memory run")
COUNTERS = {
    "utilisation %": "utilisation_percent",
    "SM clock MHz": "sm_clock_mhz",
    "power W": "power_w",
    "temperature C": "temperature_c",
}


def trace(profile: Profile) -> dict[str, Any]:
    """The trace, ready for json.dumps; times in microseconds."""
    events: list[Event] = []
    for number, bundle in enumerate(profile.bundles):
        first = 1 + number * len(TRACKS)
        for pid, track in enumerate(TRACKS, start=first):
            events.append(_metadata(pid, "process_name", name=f"{bundle.label}: {track}"))
            events.append(_metadata(pid, "process_sort_index", sort_index=pid))
        events += [*_stages(bundle, first), *_launches(bundle, first + 1), *_memory(bundle.memory, first + 2)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _metadata(pid: int, what: str, thread: int | None = None, **args: Any) -> Event:
    return {"ph": "M", "name": what, "pid": pid, **({} if thread is None else {"tid": thread}), "args": args}


def _span(name: str, pid: int, thread: int, start_us: float, dur_us: float, **args: Any) -> Event:
    """A complete event."""
    event = {"name": name, "cat": "fastvar", "ph": "X", "pid": pid, "tid": thread}
    return {**event, "ts": round(start_us, 3), "dur": round(dur_us, 3), "args": args}


def _stages(bundle: BundleProfile, pid: int) -> Iterator[Event]:
    yield _metadata(pid, "thread_name", 1, name="stages, medians")
    start = 0.0
    for row in bundle.stages:
        figures = {"tokens": row.tokens, "kept": row.kept, "flop": row.cost.flop, "bytes_moved": row.cost.bytes_moved}
        yield _span(row.name, pid, 1, start, row.ms.median * 1e3, **figures)
        start += row.ms.median * 1e3


def _launches(bundle: BundleProfile, pid: int) -> Iterator[Event]:
    """Launches on one thread; on another, scales that span their launches."""
    yield _metadata(pid, "thread_name", 1, name="scales")
    yield _metadata(pid, "thread_name", 2, name="launches, medians")
    end, scales = 0.0, dict[int, tuple[float, float]]()
    for launch in bundle.launches:
        start, end = end, end + launch.ms * 1e3
        yield _span(launch.engine, pid, 2, start, launch.ms * 1e3, kind=launch.kind, layer=launch.layer)
        if launch.scale is not None:
            scales[launch.scale] = (scales.get(launch.scale, (start,))[0], end)
    for scale, (start, end) in scales.items():
        yield _span(f"scale {scale}", pid, 1, start, end - start)


def _memory(run: MemoryRun, pid: int) -> Iterator[Event]:
    yield _metadata(pid, "thread_name", 1, name="loading and first image")
    for event in (run.loading, *run.launches):
        figures = {"before_bytes": event.before_bytes, "after_bytes": event.after_bytes, "scale": event.scale}
        yield _span(event.name, pid, 1, event.start_s * 1e6, (event.end_s - event.start_s) * 1e6, **figures)
    yield from _counters(run.recording, pid)


def _counters(recording: Recording, pid: int) -> Iterator[Event]:
    for sample, held in zip(recording.samples, memory_of(recording.samples), strict=True):
        readings = {"memory bytes": held, **{name: getattr(sample, field) for name, field in COUNTERS.items()}}
        for name, value in readings.items():
            if value is not None:
                time_us = round(sample.time_s * 1e6, 3)
                yield {"name": name, "ph": "C", "pid": pid, "ts": time_us, "args": {name: value}}
