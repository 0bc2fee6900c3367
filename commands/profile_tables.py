"""What `fastvar profile` prints: a table of the stages, and a few lines on the whole."""

from __future__ import annotations

from rich.table import Table

from ..engines.dtypes import human_bytes
from ..profiling.figures import flop, milliseconds, percent, three_digits, times
from ..profiling.records import BundleProfile, Profile, Row


def stage_table(profile: Profile) -> Table:
    """Every stage of the subject, with the other bundle's time beside it where there is one."""
    subject, against = profile.subject, profile.against
    table = Table(title=f"{subject.label}: medians of {profile.settings['runs']} runs")
    for heading in ("stage", "kept", "ms", "p95", "share", "FLOP/s", *([against.label, "ratio"] if against else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in subject.stages:
        table.add_row(*_cells(row), *(_versus(row, against) if against else ()))
    return table


def _cells(row: Row) -> tuple[str, ...]:
    stage = row.name if row.size is None else f"{row.scale}: {row.size[1]}x{row.size[0]}"
    kept = "" if row.tokens is None else str(row.tokens) if row.kept == row.tokens else f"{row.kept} of {row.tokens}"
    times_ms = three_digits(row.ms.median), three_digits(row.ms.p95)
    return stage, kept, *times_ms, percent(row.share), flop(row.flop_per_s, "")


def _versus(row: Row, against: BundleProfile) -> tuple[str, str]:
    other = next((found for found in against.stages if found.name == row.name), None)
    if other is None:
        return "skipped", ""
    return three_digits(other.ms.median), f"{other.ms.median / row.ms.median:.2f}"


def summary_lines(profile: Profile) -> list[str]:
    """Image, memory, budget."""
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
