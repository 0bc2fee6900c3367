"""The plots of a report as SVG, each for any width: a page holds one for wide and one for narrow screens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..engines.dtypes import human_bytes
from .canvas import Canvas, text_width
from .figures import milliseconds, percent, three_digits, times
from .records import BundleProfile, MemoryEvent, MemoryRun, Profile, Row
from .samples import memory_of

LABELS, RATIOS, VALUES = 78, 50, 52  # pixels beside the bars
BAR, BAR_GAP, ROW_GAP = 13, 3, 12
WHISKER_LIMIT = 1.5  # longest whisker drawn, in longest bars: one slow run must not squeeze all others
AXIS = "seconds from before the bundle is loaded"
SERIES = ("reference", "subject")  # classes of the bars, as the bundles are ordered


def latency(profile: Profile, width: float, kind: str) -> str:
    """Milliseconds of every stage as bars, the other bundle's above the subject's; whiskers to the 95th percentile."""
    bundles, names = profile.bundles, _stage_names(profile)
    styles = SERIES[-len(bundles) :]
    rows = {name: [_stage(bundle, name) for bundle in bundles] for name in names}
    longest = max(row.ms.median for found in rows.values() for row in found if row)
    reach = min(max(row.ms.p95 for found in rows.values() for row in found if row), WHISKER_LIMIT * longest)
    pitch = len(bundles) * (BAR + BAR_GAP) + ROW_GAP
    canvas = Canvas(width, pitch * len(rows), _latency_title(profile), kind)
    ratios = RATIOS if profile.against else 0
    per_ms = (width - LABELS - VALUES - ratios) / reach
    for position, (name, found) in enumerate(rows.items()):
        top = position * pitch + ROW_GAP / 2
        _stage_label(canvas, name, next(row for row in reversed(found) if row), top, pitch - ROW_GAP)
        for number, (row, bundle) in enumerate(zip(found, bundles, strict=True)):
            _bar(canvas, row, bundle.label, styles[number], top + number * (BAR + BAR_GAP), per_ms, reach)
        if len(found) == 2 and found[0] and found[1] and found[1].ms.median:
            middle = top + (pitch - ROW_GAP) / 2 + 3
            canvas.text(width, middle, times(found[0].ms.median / found[1].ms.median), "strong", "end")
    return canvas.svg()


def _latency_title(profile: Profile) -> str:
    versus = f", {profile.against.label} against {profile.subject.label}" if profile.against else ""
    return f"Milliseconds per stage{versus}: medians, whiskers to the 95th percentile"


def _stage_names(profile: Profile) -> list[str]:
    """Every stage that any bundle runs, scales in order between text and decoder."""
    stages = {row.name: row.scale for bundle in profile.bundles for row in bundle.stages}
    scales = sorted((name for name, scale in stages.items() if scale is not None), key=lambda name: stages[name] or 0)
    return ["text", *scales, "decoder"]


def _stage(bundle: BundleProfile, name: str) -> Row | None:
    return next((row for row in bundle.stages if row.name == name), None)


def _stage_label(canvas: Canvas, name: str, row: Row, top: float, height: float) -> None:
    middle = top + height / 2 + 3
    if row.size is None:
        canvas.text(0, middle, name)
        return
    grid = f"{row.size[1]}×{row.size[0]}"  # noqa: RUF001
    pruned = row.tokens is not None and row.kept is not None and row.kept < row.tokens
    canvas.text(0, middle - (5 if pruned and height > 20 else 0), grid)
    if pruned and height > 20:
        canvas.text(0, middle + 9, f"{row.kept} of {row.tokens}", "muted small")


def _bar(canvas: Canvas, row: Row | None, label: str, style: str, top: float, per_ms: float, reach: float) -> None:
    baseline = top + BAR - 2.5
    if row is None:
        canvas.text(LABELS, baseline, "skipped", "muted small")
        return
    end, whisker = (LABELS + per_ms * min(ms, reach) for ms in (row.ms.median, row.ms.p95))
    tip = f"{label}, {row.name}: {milliseconds(row.ms.median)}, 95 % of runs within {milliseconds(row.ms.p95)}"
    canvas.rect(LABELS, top, end - LABELS, BAR, style, tip)
    canvas.line(end, top + BAR / 2, whisker, top + BAR / 2, "whisker", tip)
    canvas.text(max(end, whisker) + 5, baseline, three_digits(row.ms.median), "small")


def kind_shares(bundle: BundleProfile) -> list[tuple[str, float]]:
    """Kinds of engines with their share of the time of all launches, the largest first."""
    shares: dict[str, float] = {}
    for row in bundle.engines:
        shares[row.kind] = shares.get(row.kind, 0.0) + row.share
    return sorted(shares.items(), key=lambda item: -item[1])


def cumulative(bundle: BundleProfile, width: float, kind: str) -> str:
    """Share of every kind of engine, each bar beginning where the one above it ends."""
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


@dataclass(frozen=True)
class _Frame:
    """Where data lies on a plot."""

    left: float
    top: float
    width: float
    height: float
    span_s: float
    span_bytes: float

    def x(self, time_s: float) -> float:
        return self.left + self.width * time_s / self.span_s

    def y(self, size: float) -> float:
        return self.top + self.height * (1 - min(size / self.span_bytes, 1))

    @property
    def bottom(self) -> float:
        return self.top + self.height


def memory_top(runs: Sequence[MemoryRun]) -> float:
    """The upper end of the axis for several plots: over all peaks, and over the budget unless that is far away."""
    peak = max(run.recording.peak_bytes for run in runs)
    budget = runs[0].recording.budget_bytes or 0
    return 1.25 * (budget if peak < budget <= 2.5 * peak else peak)


def memory(bundle: BundleProfile, top_bytes: float, width: float, kind: str) -> str:
    """Memory over time with the stages behind it, the peak, and the budget where there is one."""
    run = bundle.memory
    samples, recording = run.recording.samples, run.recording
    frame = _Frame(64, 22, width - 66, 190, samples[-1].time_s, top_bytes)
    title = f"Memory over time, {bundle.label}: peak {human_bytes(recording.peak_bytes)}"
    canvas = Canvas(width, frame.bottom + 38, title, kind)
    _bands(canvas, frame, run)
    _axes(canvas, frame)
    points = [(frame.x(s.time_s), frame.y(held)) for s, held in zip(samples, memory_of(samples), strict=True)]
    area = [(frame.x(0), frame.bottom), *points, (points[-1][0], frame.bottom)]
    canvas.path(area, "area", closed=True)
    canvas.path(points, "curve")
    _level(canvas, frame, recording.peak_bytes, f"peak {human_bytes(recording.peak_bytes)}", "peak")
    if recording.budget_bytes is not None:
        _budget(canvas, frame, recording.budget_bytes)
    return canvas.svg()


def _stages_of(run: MemoryRun) -> list[tuple[str, list[MemoryEvent]]]:
    """Consecutive launches of one stage: loading, text, each scale, decoder."""
    stages: list[tuple[str, list[MemoryEvent]]] = [(run.loading.name, [run.loading])]
    for event in run.launches:
        last = event is run.launches[-1]
        name = "decoder" if last else "text" if event.scale is None else f"scale {event.scale}"
        if stages[-1][0] != name:
            stages.append((name, []))
        stages[-1][1].append(event)
    return stages


def _bands(canvas: Canvas, frame: _Frame, run: MemoryRun) -> None:
    for number, (name, events) in enumerate(_stages_of(run)):
        start, end = frame.x(events[0].start_s), frame.x(events[-1].end_s)
        grown = f"{human_bytes(events[0].before_bytes)} before, {human_bytes(events[-1].after_bytes)} after"
        canvas.rect(start, frame.top, end - start, frame.height, f"band{number % 2}", f"{name}: {grown}", 0)
        short = name.removeprefix("scale ")
        for label in (name, short):
            if text_width(label) + 3 < end - start:
                canvas.text((start + end) / 2, frame.top - 6, label, "muted small", "middle")
                break


def _axes(canvas: Canvas, frame: _Frame) -> None:
    step = 1 << max(0, math.ceil(math.log2(frame.span_bytes / 5)))
    for size in range(0, int(frame.span_bytes) + 1, step):
        canvas.line(frame.left, frame.y(size), frame.left + frame.width, frame.y(size), "grid")
        canvas.text(frame.left - 7, frame.y(size) + 4, _axis_bytes(size), "muted small", "end")
    second = _nice_step(frame.span_s / 5)
    for number in range(int(frame.span_s / second) + 1):
        canvas.text(frame.x(number * second), frame.bottom + 17, f"{number * second:g}", "muted small", "middle")
    canvas.text(frame.left + frame.width, frame.bottom + 34, AXIS, "muted small", "end")


def _axis_bytes(size: int) -> str:
    return human_bytes(size).replace(".00 ", " ").replace(".0 ", " ")


def _nice_step(rough: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power: float = 10 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


def _level(canvas: Canvas, frame: _Frame, size: float, label: str, style: str, *, at_right: bool = False) -> None:
    right, y = frame.left + frame.width, frame.y(size)
    canvas.line(frame.left, y, right, y, f"{style}-line", label)
    x, anchor = (right - 4, "end") if at_right else (frame.left + 6, "start")
    canvas.text(x, y - 5, label, f"{style}-text small", anchor)


def _budget(canvas: Canvas, frame: _Frame, budget: int) -> None:
    label = f"budget {human_bytes(budget)}"
    if budget <= frame.span_bytes:
        _level(canvas, frame, budget, label, "budget", at_right=True)
        return
    right = frame.left + frame.width
    canvas.line(frame.left, frame.top, right, frame.top, "budget-line", f"{label}, beyond this axis")
    canvas.text(right - 4, frame.top + 15, f"↑ {label}", "budget-text small", "end")
