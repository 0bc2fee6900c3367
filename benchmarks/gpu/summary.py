"""The journal as one record: what is printed, and, of a real GPU, written among the results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.builder import RESULTS
from benchmarks.gpu.journal import WHOLE, Line
from fastvar.core.files import write_json
from fastvar.engines.aotinductor.stand_in_gpu import NONSENSE
from fastvar.errors import InputError

Record = dict[str, Any]
LONGEST = 160  # characters of a line for people
REHEARSAL = "a stand-in for a GPU measured some of this: it computes nothing, and all figures are nonsense"


def record_of(lines: Sequence[Line]) -> Record:
    """The latest line of every measurement, by section.

    Raises:
        InputError: the journal is empty.
    """
    if not lines:
        raise InputError("the journal is empty: nothing was measured", fix="python -m benchmarks.gpu")
    sections: dict[str, Record] = {}
    for line in lines:
        kept = {name: line[name] for name in ("values", "error", "seconds", "when") if name in line}
        sections.setdefault(line["section"], {})[line["name"]] = kept
    machine = sections.get("build", {}).get("machine", {}).get("values", {})
    return {
        "what": "a GPU's day of fastvar: aotinductor, guidance on; random weights but the demo's; batch 1, "
        "but in the section batch",
        "when": lines[-1]["when"],
        "gpu": machine.get("gpu", "unknown"),
        "nonsense": is_nonsense(lines),
        "failed": failures(sections),
        "sections": sections,
    }


def is_nonsense(lines: Sequence[Line]) -> bool:
    """Whether any of it comes from a GPU that is not there."""
    return any(line["stand_in"] is not False for line in lines)


def failures(sections: Record) -> list[str]:
    return [f"{s}: {name}" for s, names in sections.items() for name, line in names.items() if not _passed(line)]


def _passed(line: Record) -> bool:
    values = line.get("values")
    return "error" not in line and not (isinstance(values, dict) and values.get("ok") is False)


def write_record(lines: Sequence[Line], folder: Path = RESULTS) -> Path | None:
    """Write the record under the GPU's name, unless any line is a stand-in's: then nothing is written, and None given.

    Raises:
        InputError: the journal is empty, or the file cannot be written.
    """
    record = record_of(lines)
    if record["nonsense"]:
        return None
    name = re.sub(r"[^a-z0-9]+", "-", str(record["gpu"]).lower()).strip("-")
    return write_json(folder / f"gpu-{name}-aotinductor.json", record)


def text_of(record: Record) -> str:
    """A line a measurement, for people."""
    said = [f"{REHEARSAL}\n({NONSENSE})"] if record["nonsense"] else []
    for section, names in record["sections"].items():
        whole = names.get(WHOLE, {})
        ended = "; ".join(whole.get("error", "done").splitlines())[:LONGEST]
        said.append(f"{section}: {ended} ({whole.get('seconds', 0):.0f} s)")
        said += [f"  {name}: {_short(line)}" for name, line in names.items() if name != WHOLE]
    failed = record["failed"]
    said.append(f"failed: {len(failed)}" if failed else "all passed")
    return "\n".join(said)


def _short(line: Record) -> str:
    if "error" in line:
        return f"error: {line['error'].splitlines()[0][:LONGEST]}"
    values = line["values"]
    if not isinstance(values, dict):
        return str(values)[:LONGEST]
    found = [f"{name} {_number(value)}" for name, value in values.items() if isinstance(value, int | float | str)]
    if isinstance(errors := values.get("logits_relative_error"), list):
        found.append(f"worst scale {_number(max(errors, key=float))}")
    return ", ".join(found)[:LONGEST]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
