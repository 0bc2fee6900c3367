"""The plots of a report as SVG. Each is drawn for any width: a page holds one for wide and one for narrow screens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from ...core.dtypes import human_bytes
from ..formatting import milliseconds, percent, three_digits, times
from ..records import BundleProfile, MemoryEvent, MemoryRun, Profile, Row
from ..samples import memory_of
from .svg import Axis, Canvas, Frame, round_ticks, text_width

LABELS, RATIOS, VALUES = 78, 50, 52  # pixels beside the bars
BAR, BAR_GAP, ROW_GAP = 13, 3, 12
WHISKER_LIMIT = 1.5  # longest whisker in longest bars: one slow run must not shrink all bars
SERIES = ("reference", "subject")  # classes of the bars, in the order of the bundles


def latency(profile: Profile, width: float, kind: str) -> str:
    """Milliseconds of each stage as bars, one per bundle, with whiskers to the 95th percentile."""
    bundles, names = profile.bundles, _stage_names(profile)
    styles = SERIES[-len(bundles) :]
    rows = {name: [bundle.stage(name) for bundle in bundles] for name in names}
    longest = max(row.ms.median for found in rows.values() for row in found if row)
    reach = min(max(row.ms.p95 for found in rows.values() for row in found if row), WHISKER_LIMIT * longest)
    pitch = len(bundles) * (BAR + BAR_GAP) + ROW_GAP
    versus = f", {profile.against.label} against {profile.subject.label}" if profile.against else ""
    title = f"Milliseconds per stage{versus}: medians, whiskers to the 95th percentile"
    canvas = Canvas(width, pitch * len(rows), title, kind)
    per_ms = (width - LABELS - VALUES - (RATIOS if profile.against else 0)) / reach
    for position, (name, found) in enumerate(rows.items()):
        top = position * pitch + ROW_GAP / 2
        middle = top + (pitch - ROW_GAP) / 2 + 3
        _stage_label(canvas, name, next(row for row in reversed(found) if row), middle, two_lines=len(bundles) > 1)
        for number, (row, bundle) in enumerate(zip(found, bundles, strict=True)):
            _bar(canvas, row, bundle.label, styles[number], top + number * (BAR + BAR_GAP), per_ms, reach)
        if len(found) == 2 and found[0] and found[1] and found[1].ms.median:
            canvas.text(width, middle, times(found[0].ms.median / found[1].ms.median), "strong", "end")
    return canvas.svg()


def _stage_names(profile: Profile) -> list[str]:
    """Every stage that a bundle runs: text, scales in order, decoder."""
    stages = {row.name: row.scale for bundle in profile.bundles for row in bundle.stages}
    scales = sorted((name for name, scale in stages.items() if scale is not None), key=lambda name: stages[name] or 0)
    return ["text", *scales, "decoder"]


def _stage_label(canvas: Canvas, name: str, row: Row, middle: float, *, two_lines: bool) -> None:
    pruned = two_lines and row.kept is not None and row.tokens is not None and row.kept < row.tokens
    canvas.text(0, middle - (5 if pruned else 0), grid(row) or name)
    if pruned:
        canvas.text(0, middle + 9, f"{row.kept} of {row.tokens}", "muted small")


def grid(row: Row) -> str:
    """Width and height of a scale in tokens; "" for other stages."""
    return "" if row.size is None else f"{row.size[1]}×{row.size[0]}"  # noqa: RUF001


def _bar(canvas: Canvas, row: Row | None, label: str, style: str, top: float, per_ms: float, reach: float) -> None:
    baseline, middle = top + BAR - 2.5, top + BAR / 2
    if row is None:
        canvas.text(LABELS, baseline, "skipped", "muted small")
        return
    end, whisker = (LABELS + per_ms * min(ms, reach) for ms in (row.ms.median, row.ms.p95))
    tip = f"{label}, {row.name}: {milliseconds(row.ms.median)}, 95 % of runs within {milliseconds(row.ms.p95)}"
    canvas.rect(LABELS, top, end - LABELS, BAR, style, tip)
    canvas.line((end, middle), (whisker, middle), "whisker", tip)
    canvas.text(max(end, whisker) + 5, baseline, three_digits(row.ms.median), "small")


def kind_shares(bundle: BundleProfile) -> list[tuple[str, float]]:
    """Kinds of engines with their share of the time of all launches, the largest first."""
    shares: dict[str, float] = {}
    for row in bundle.engines:
        shares[row.kind] = shares.get(row.kind, 0.0) + row.share
    return sorted(shares.items(), key=lambda item: -item[1])


def cumulative(bundle: BundleProfile, width: float, kind: str) -> str:
    """Share of each kind of engine. Each bar begins where the bar above it ends."""
    shares = kind_shares(bundle)
    pitch, labels, values = 28, 92, 124
    canvas = Canvas(width, pitch * len(shares) + 16, f"Share of time by kind of engine, {bundle.label}", kind)
    span, begun = width - labels - values, 0.0
    canvas.text(width - 64, 10, "share", "muted small", "end")
    canvas.text(width, 10, "together", "muted small", "end")
    for position, (name, share) in enumerate(shares):
        top = 16 + position * pitch
        canvas.text(0, top + 16, name)
        canvas.rect(labels, top + 4, span, 16, "track")
        tip = f"{name}: {percent(share)}; with those above {percent(begun + share)}"
        canvas.rect(labels + span * begun, top + 4, span * share, 16, "subject", tip)
        begun += share
        canvas.text(width - 64, top + 16, percent(share), "strong", "end")
        canvas.text(width, top + 16, percent(begun), "muted", "end")
    return canvas.svg()


def memory_top(runs: Sequence[MemoryRun]) -> float:
    """The upper end of the axis shared by several plots: above all peaks, and above the budget if it is near them."""
    peak = max(run.recording.peak_bytes for run in runs)
    budget = runs[0].recording.budget_bytes or 0
    return 1.25 * (budget if peak < budget <= 2.5 * peak else peak)


def memory(bundle: BundleProfile, top_bytes: float, width: float, kind: str) -> str:
    """Memory over time, with the stages in the background, the peak, and the budget if one was given."""
    recording = bundle.memory.recording
    span_s, peak = recording.samples[-1].time_s, f"peak {human_bytes(recording.peak_bytes)}"
    x = Axis("seconds from before the bundle is loaded", 0, span_s, round_ticks(0, span_s))
    step = 1 << max(0, math.ceil(math.log2(top_bytes / 5)))
    frame = Frame(64, 22, width - 66, 190, x, Axis("", 0, top_bytes, range(0, int(top_bytes) + 1, step), _axis_bytes))
    canvas = Canvas(width, frame.bottom + 38, f"Memory over time, {bundle.label}: {peak}", kind)
    _bands(canvas, frame, bundle.memory)
    frame.draw(canvas)
    held = zip(recording.samples, memory_of(recording.samples), strict=True)
    points = [frame.place(sample.time_s, min(size, top_bytes)) for sample, size in held]
    canvas.polyline([(frame.left, frame.bottom), *points, (points[-1][0], frame.bottom)], "area")
    canvas.polyline(points, "curve")
    _level(canvas, frame, recording.peak_bytes, peak, "peak")
    if recording.budget_bytes is not None:
        _level(canvas, frame, recording.budget_bytes, f"budget {human_bytes(recording.budget_bytes)}", "budget")
    return canvas.svg()


def _bands(canvas: Canvas, frame: Frame, run: MemoryRun) -> None:
    """A band for each stage: consecutive launches of the text encoder, of a scale, or of the decoder."""

    def stage(event: MemoryEvent) -> str:
        if event is run.loading:
            return event.name
        if event is run.launches[-1]:
            return "decoder"
        return "text" if event.scale is None else f"scale {event.scale}"

    for number, (name, group) in enumerate(groupby((run.loading, *run.launches), stage)):
        events = list(group)
        start, end = frame.place(events[0].start_s, 0)[0], frame.place(events[-1].end_s, 0)[0]
        tip = f"{name}: {human_bytes(events[0].before_bytes)} before, {human_bytes(events[-1].after_bytes)} after"
        canvas.rect(start, frame.top, end - start, frame.height, f"band{number % 2}", tip, 0)
        fitting = [label for label in (name, name.removeprefix("scale ")) if text_width(label) + 3 < end - start]
        for label in fitting[:1]:
            canvas.text((start + end) / 2, frame.top - 6, label, "muted small", "middle")


def _axis_bytes(size: float) -> str:
    return human_bytes(int(size)).replace(".00 ", " ").replace(".0 ", " ")


def _level(canvas: Canvas, frame: Frame, size: int, label: str, style: str) -> None:
    """A horizontal line; it is the top of the frame, marked by an arrow, if `size` lies beyond the axis."""
    beyond = size > frame.y.high
    y = frame.top if beyond else frame.place(0, size)[1]
    canvas.line((frame.left, y), (frame.right, y), f"{style}-line", f"{label}, beyond this axis" if beyond else label)
    x, anchor = (frame.left + 6, "start") if style == "peak" else (frame.right - 4, "end")
    canvas.text(x, y + (15 if beyond else -5), f"↑ {label}" if beyond else label, f"{style}-text small", anchor)
