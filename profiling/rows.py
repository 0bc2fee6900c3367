"""From raw timings to the rows of a profile's tables: launches are grouped, and their costs added."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from ..engines.bundle.manifest import Manifest
from ..runtime.output import ImageTimings
from .estimates.costs import CallCost, EngineCosts, Kind, add
from .records import LaunchMs, MemoryEvent, Row, Spread, spread

TEXT, SCALES, DECODER, IMAGE = "text", "scales", "decoder", "image"


def totals(images: Sequence[ImageTimings]) -> dict[str, Spread]:
    """Spreads over whole images: of the text, all scales, the decoder, and their sum."""
    return {
        TEXT: spread([image.text_ms for image in images]),
        SCALES: spread([image.scales_ms for image in images]),
        DECODER: spread([image.decode_ms for image in images]),
        IMAGE: spread([image.total_ms for image in images]),
    }


def stage_rows(
    manifest: Manifest, costs: EngineCosts, images: Sequence[ImageTimings], events: Sequence[MemoryEvent]
) -> tuple[Row, ...]:
    """Rows of text, each scale, and decoder, timed in whole images. `events` holds one event per launch."""
    ms = {TEXT: [image.text_ms for image in images], DECODER: [image.decode_ms for image in images]}
    for position, step in enumerate(manifest.plan.steps):
        ms[_scale_name(step.index)] = [image.scales[position].ms for image in images]
    groups = _grouped([_stage(call) for call in costs.calls])
    rows = _rows(manifest, costs, groups.values(), [ms[name] for name in groups], events)
    kept = {step.index: step.kept for step in manifest.plan.steps}
    return tuple(
        replace(row, name=name, kind=name)
        if row.scale is None
        else replace(row, name=name, kind="scale", kept=kept[row.scale])
        for name, row in zip(groups, rows, strict=True)
    )


def engine_rows(
    manifest: Manifest, costs: EngineCosts, runs: Sequence[Sequence[float]], events: Sequence[MemoryEvent]
) -> tuple[Row, ...]:
    """Rows of each engine at each scale, over its layers. `runs` holds the milliseconds of each launch, per image."""
    groups = _grouped([(call.scale, call.engine) for call in costs.calls])
    ms = [[sum(run[i] for i in indices) for run in runs] for indices in groups.values()]
    return _rows(manifest, costs, groups.values(), ms, events)


def launch_medians(costs: EngineCosts, runs: Sequence[Sequence[float]]) -> tuple[LaunchMs, ...]:
    """Median milliseconds of each launch, in order."""
    return tuple(
        LaunchMs(call.engine, call.kind.value, call.scale, call.layer, median(values))
        for call, values in zip(costs.calls, zip(*runs, strict=True), strict=True)
    )


def _stage(call: CallCost) -> str:
    if call.scale is not None:
        return _scale_name(call.scale)
    return DECODER if call.kind is Kind.DECODER else TEXT


def _scale_name(index: int) -> str:
    return f"scale {index}"


def _grouped(keys: Sequence[Hashable]) -> dict[Any, list[int]]:
    """Key -> indices of its launches, in the order of first appearance."""
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return groups


def _rows(
    manifest: Manifest,
    costs: EngineCosts,
    groups: Iterable[list[int]],
    ms: Sequence[Sequence[float]],
    events: Sequence[MemoryEvent],
) -> tuple[Row, ...]:
    """A row for each group of launches, named after its first engine."""
    steps = {step.index: step for step in manifest.plan.steps}
    spreads = [spread(values) for values in ms]
    whole = sum(found.median for found in spreads)
    rows = []
    for indices, found in zip(groups, spreads, strict=True):
        calls = [costs.calls[i] for i in indices]
        first = calls[0]
        step = None if first.scale is None else steps[first.scale]
        rows.append(
            Row(
                name=first.engine,
                kind=first.kind.value,
                launches=len(calls),
                ms=found,
                share=found.median / whole if whole else 0.0,
                cost=add(call.cost for call in calls),
                scale=first.scale,
                size=None if step is None else step.size,
                tokens=None if step is None else step.tokens,
                kept=first.tokens,
                memory_before_bytes=events[indices[0]].before_bytes,
                memory_after_bytes=events[indices[-1]].after_bytes,
            )
        )
    return tuple(rows)
