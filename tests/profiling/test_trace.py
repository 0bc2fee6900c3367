"""The trace against the Trace Event Format's rules for complete, counter and metadata events."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from typing import Any

import pytest

from fastvar.profiling.records import Profile
from fastvar.profiling.trace import trace

Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def events(measured: Profile) -> Events:
    return json.loads(json.dumps(trace(measured), allow_nan=False))["traceEvents"]


def of(events: Events, phase: str) -> Events:
    return [event for event in events if event["ph"] == phase]


def test_every_event_is_complete(events: Events):
    assert {event["ph"] for event in events} == {"X", "C", "M"}
    for event in of(events, "X"):
        assert event["name"]
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert isinstance(event["tid"], int)
    for event in of(events, "C"):
        assert all(isinstance(value, int | float) for value in event["args"].values())


def test_processes_and_threads_have_names(events: Events):
    named = {event["pid"]: event["args"]["name"] for event in of(events, "M") if event["name"] == "process_name"}
    assert set(named) == {event["pid"] for event in events}
    assert len(set(named.values())) == len(named) == 6
    threads = {(event["pid"], event["tid"]) for event in of(events, "M") if event["name"] == "thread_name"}
    assert threads == {(event["pid"], event["tid"]) for event in of(events, "X")}


def test_spans_of_a_thread_do_not_overlap(events: Events):
    threads: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in of(events, "X"):
        threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in threads.values():
        for one, following in itertools.pairwise(sorted(spans)):
            assert one[1] <= following[0] + 0.01


def test_durations_are_microseconds(measured: Profile, events: Events):
    other = [event for event in of(events, "X") if event["pid"] == 1]
    assert [event["name"] for event in other] == [row.name for row in measured.bundles[0].stages]
    for event, row in zip(other, measured.bundles[0].stages, strict=True):
        assert event["dur"] == pytest.approx(row.ms.median * 1e3, abs=0.001)
    scales = [event for event in of(events, "X") if (event["pid"], event["tid"]) == (2, 1)]
    for event in scales:
        scale = int(event["name"].removeprefix("scale "))
        launches = [launch.ms for launch in measured.bundles[0].launches if launch.scale == scale]
        assert event["dur"] == pytest.approx(1e3 * sum(launches), abs=0.01)


def test_memory_is_counted_over_time(measured: Profile, events: Events):
    for pid, bundle in zip((3, 6), measured.bundles, strict=True):
        counters = [e for e in of(events, "C") if e["pid"] == pid and e["name"] == "memory bytes"]
        samples = bundle.memory.recording.samples
        assert [e["args"]["memory bytes"] for e in counters] == [s.process_bytes for s in samples]
        assert [e["ts"] for e in counters] == pytest.approx([s.time_s * 1e6 for s in samples], abs=0.001)
