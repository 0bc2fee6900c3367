"""What `fastvar profile` prints: a table of the stages, and summary lines."""

from __future__ import annotations

from rich.table import Table

from ..core.dtypes import human_bytes
from ..profiling.formatting import flop, milliseconds, percent, pixels, three_digits, times
from ..profiling.records import BundleProfile, Profile, Row
from ..profiling.report.columns import Column, text_table


def stage_table(profile: Profile) -> Table:
    """Every stage of the subject, with the other bundle's time if there is one."""
    subject, against = profile.subject, profile.against
    columns = [
        Column("stage", lambda row: row.name if row.size is None else f"{row.scale}: {pixels(row.size)}"),
        Column("kept", _kept),
        Column("ms", "ms.median", three_digits),
        Column("p95", "ms.p95", three_digits),
        Column("share", format=percent),
        Column("FLOP/s", "flop_per_s", lambda rate: flop(rate, "")),
    ]
    if against is not None:
        ms = {row.name: row.ms.median for row in against.stages}
        columns += [
            Column(against.label, lambda row: three_digits(ms[row.name]) if row.name in ms else "skipped"),
            Column("ratio", lambda row: f"{ms[row.name] / row.ms.median:.2f}" if row.name in ms else ""),
        ]
    title = f"{subject.label}: medians of {profile.settings['runs']} runs"
    return text_table(columns, subject.stages, no_wrap=True, title=title)


def _kept(row: Row) -> str | None:
    if row.tokens is None:
        return None
    return str(row.tokens) if row.kept == row.tokens else f"{row.kept} of {row.tokens}"


def summary_lines(profile: Profile) -> list[str]:
    """Time, arithmetic and memory of each bundle, and the speed-up."""
    lines = []
    for bundle in reversed(profile.bundles):
        image, recording = bundle.totals["image"], bundle.memory.recording
        lines.append(
            f"{bundle.label}: image {milliseconds(image.median)} (95 % within {milliseconds(image.p95)}), "
            f"{flop(bundle.cost.flop)}, peak memory {human_bytes(recording.peak_bytes)}{_budget(bundle)}"
        )
    scales, image_ratio = profile.speedup("scales"), profile.speedup("image")
    if profile.against is not None and scales is not None and image_ratio is not None:
        pair = f"{profile.subject.label} against {profile.against.label}"
        lines.append(f"{pair}: all scales {times(scales)}, image {times(image_ratio)}")
    return lines


def _budget(bundle: BundleProfile) -> str:
    recording = bundle.memory.recording
    if recording.budget_bytes is None or recording.headroom_bytes is None:
        return ""
    budget = human_bytes(recording.budget_bytes)
    if recording.over_budget:
        return f": {human_bytes(-recording.headroom_bytes)} over the budget of {budget}"
    return f": {human_bytes(recording.headroom_bytes)} below the budget of {budget}"
