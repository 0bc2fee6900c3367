"""The files of a profile: report.html, profile.json, profile.csv, trace.json. Files of others are never overwritten."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...core.files import write_text
from ...core.platform import import_extra
from ...core.version import __version__
from ...errors import InputError
from ...runtime.images.files import check_writable
from ..estimates.costs import Cost
from ..records import BundleProfile, Profile, Row
from ..samples import Recording
from ..trace import trace
from .page import report

MARK = "fastvar profile"  # within the first bytes of every file: it marks the file as written by this command
MARK_WITHIN = 400
COLUMNS = (
    *("bundle", "table", "name", "kind", "scale", "height", "width", "tokens", "kept", "launches"),
    *("ms_median", "ms_p95", "share", "flop", "flop_per_s", "bytes_moved", "bytes_per_s"),
    *("memory_before_bytes", "memory_after_bytes"),
)


def to_json(profile: Profile) -> dict[str, Any]:
    """The profile, ready for json.dumps. Units: bytes, milliseconds, FLOP, shares from 0 to 1."""
    return {
        "what": MARK,
        "fastvar": __version__,
        "when": profile.when,
        "settings": profile.settings,
        "environment": profile.environment,
        "budget_bytes": profile.budget_bytes,
        "speedup": {part: profile.speedup(part) for part in profile.subject.totals} if profile.against else None,
        "bundles": [_bundle_json(bundle) for bundle in profile.bundles],
    }


def _bundle_json(bundle: BundleProfile) -> dict[str, Any]:
    return {
        "label": bundle.label,
        **bundle.facts,
        "totals_ms": {part: asdict(found) for part, found in bundle.totals.items()},
        "cost": _cost_json(bundle.cost),
        "kv_cache_bytes": bundle.kv_cache_bytes,
        "stages": [_row_json(row) for row in bundle.stages],
        "engines": [_row_json(row) for row in bundle.engines],
        "launches": [asdict(launch) for launch in bundle.launches],
        "memory": {
            **_recording_json(bundle.memory.recording),
            "events": [asdict(event) for event in (bundle.memory.loading, *bundle.memory.launches)],
        },
        "kept": [asdict(kept) for kept in bundle.kept],
    }


def _row_json(row: Row) -> dict[str, Any]:
    rates = {"flop_per_s": row.flop_per_s, "bytes_per_s": row.bytes_per_s}
    return {**asdict(row), "cost": _cost_json(row.cost), **rates}


def _cost_json(cost: Cost) -> dict[str, int]:
    return {**asdict(cost), "flop": cost.flop}


def _recording_json(recording: Recording) -> dict[str, Any]:
    return {
        "peak_bytes": recording.peak_bytes,
        "peak_source": recording.peak.source,
        "before_bytes": recording.before_bytes,
        "budget_bytes": recording.budget_bytes,
        "headroom_bytes": recording.headroom_bytes,
        "over_budget": recording.over_budget,
        "samples": [asdict(sample) for sample in recording.samples],
    }


def to_csv(profile: Profile) -> str:
    """One line for each stage, and for each engine at a scale, of every bundle."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for bundle in profile.bundles:
        for table, rows in (("stage", bundle.stages), ("engine", bundle.engines)):
            writer.writerows((bundle.label, table, *_cells(row)) for row in rows)
    return file.getvalue()


def _cells(row: Row) -> tuple[object, ...]:
    height, width = row.size or (None, None)
    return (
        *(row.name, row.kind, row.scale, height, width, row.tokens, row.kept, row.launches),
        *(row.ms.median, row.ms.p95, row.share, row.cost.flop, row.flop_per_s),
        *(row.cost.bytes_moved, row.bytes_per_s, row.memory_before_bytes, row.memory_after_bytes),
    )


def _trace_json(profile: Profile) -> str:
    return json.dumps({"otherData": {"what": MARK, "fastvar": __version__}, **trace(profile)}, allow_nan=False)


FILES: dict[str, Callable[[Profile], str]] = {
    "report.html": report,
    "profile.json": lambda profile: json.dumps(to_json(profile), indent=1, allow_nan=False) + "\n",
    "profile.csv": to_csv,
    "trace.json": _trace_json,
}


def check_folder(folder: Path) -> None:
    """Refuse a folder that a profile cannot be written to, before anything is measured.

    Raises:
        InputError: it is a file, is not writable, or holds other files of the same names.
        BackendError: Jinja2 is not installed.
    """
    import_extra("jinja2", "profile")  # of report.html
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"--out {folder} is not a folder", expected="a folder, or a name that is free")
    check_writable(folder)
    for name in FILES:
        if os.path.lexists(folder / name) and not _is_own(folder / name):
            raise InputError(
                f"{folder / name} was not written by `fastvar profile`", fix="choose another folder with --out"
            )


def _is_own(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(MARK_WITHIN).decode(errors="replace")
    return MARK in beginning or beginning.startswith(",".join(COLUMNS))


def write(profile: Profile, folder: Path) -> list[Path]:
    """Write all files and return their paths.

    Raises:
        InputError: as `check_folder`, or the disk is full.
    """
    check_folder(folder)
    texts = {folder / name: make(profile) for name, make in FILES.items()}
    return [write_text(path, text) for path, text in texts.items()]
