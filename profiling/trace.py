"""A profile as a Chrome trace (Trace Event Format), for Perfetto or chrome://tracing.

Each bundle is up to three processes: its whole images (medians laid end to end), its launches one by one (the same),
and its memory run on the clock it ran by, with counters.
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
    """Ready for json.dumps; times in microseconds."""
    events: list[Event] = []
    for number, bundle in enumerate(profile.bundles):
        first = 1 + number * len(TRACKS)
        for pid, track in enumerate(TRACKS, start=first):
            events.append({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": f"{bundle.label}: {track}"}})
            events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}})
        events += [*_stages(bundle, first), *_launches(bundle, first + 1), *_memory(bundle.memory, first + 2)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _span(name: str, pid: int, thread: int, start_us: float, dur_us: float, **args: Any) -> Event:
    """A complete event."""
    told = {"name": name, "cat": "fastvar", "ph": "X", "pid": pid, "tid": thread}
    return {**told, "ts": round(start_us, 3), "dur": round(dur_us, 3), "args": args}


def _thread(pid: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": "thread_name", "pid": pid, "tid": thread, "args": {"name": name}}


def _stages(bundle: BundleProfile, pid: int) -> Iterator[Event]:
    yield _thread(pid, 1, "stages, medians")
    start = 0.0
    for row in bundle.stages:
        told = {"tokens": row.tokens, "kept": row.kept, "flop": row.cost.flop, "bytes_moved": row.cost.bytes_moved}
        yield _span(row.name, pid, 1, start, row.ms.median * 1e3, **told)
        start += row.ms.median * 1e3


def _launches(bundle: BundleProfile, pid: int) -> Iterator[Event]:
    """Scales over launches: two threads, so that each scale spans its own."""
    yield _thread(pid, 1, "scales")
    yield _thread(pid, 2, "launches, medians")
    start, begun = 0.0, dict[int, float]()
    ends: dict[int, float] = {}
    for launch in bundle.launches:
        yield _span(launch.engine, pid, 2, start, launch.ms * 1e3, kind=launch.kind, layer=launch.layer)
        end = start + launch.ms * 1e3
        if launch.scale is not None:
            begun.setdefault(launch.scale, start)
            ends[launch.scale] = end
        start = end
    for scale, first in begun.items():
        yield _span(f"scale {scale}", pid, 1, first, ends[scale] - first)


def _memory(run: MemoryRun, pid: int) -> Iterator[Event]:
    yield _thread(pid, 1, "loading and first image")
    for event in (run.loading, *run.launches):
        told = {"before_bytes": event.before_bytes, "after_bytes": event.after_bytes, "scale": event.scale}
        yield _span(event.name, pid, 1, event.start_s * 1e6, (event.end_s - event.start_s) * 1e6, **told)
    yield from _counters(run.recording, pid)


def _counters(recording: Recording, pid: int) -> Iterator[Event]:
    def counter(name: str, time_s: float, value: float) -> Event:
        return {"name": name, "ph": "C", "pid": pid, "ts": round(time_s * 1e6, 3), "args": {name: value}}

    for sample, held in zip(recording.samples, memory_of(recording.samples), strict=True):
        yield counter("memory bytes", sample.time_s, held)
        for name, field in COUNTERS.items():
            value = getattr(sample, field)
            if value is not None:
                yield counter(name, sample.time_s, value)
