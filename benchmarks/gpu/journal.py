"""What was measured so far, a JSON line each, appended as soon as it is known: who is killed loses nothing before.

A line says section, name and digest, the digest of all that the measurement depends on. What is there under all three
is not measured again; a line with an error is.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastvar.engines.aotinductor.stand_in_gpu import is_stood_in
from fastvar.errors import FastvarError

Line = dict[str, Any]
WHOLE = "whole"  # the name of the line that says how a section ended
LONGEST_ERROR = 2000  # characters


class Journal:
    """A file of JSON lines; several processes may append to it.

    Args:
        path: the file. It need not be there, and its last line may be torn: such a one counts for nothing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Line]:
        """All whole lines in the order in which they were written."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return [line for row in text.split(b"\n") if (line := _parsed(row)) is not None]

    def append(
        self, section: str, name: str, digest: str, seconds: float, values: Any = None, error: str | None = None
    ) -> Line:
        """A line more, on its way to the disk when this returns. Whether a stand-in measured it is found out here."""
        line: Line = {"section": section, "name": name, "digest": digest}
        line |= {"values": _plain(values)} if error is None else {"error": error[-LONGEST_ERROR:]}
        line["seconds"] = round(seconds, 3)
        line["when"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line["stand_in"] = is_stood_in()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self.path, flags, 0o666)
        try:
            torn = b"" if _ends_whole(descriptor) else b"\n"
            os.write(descriptor, torn + json.dumps(line).encode() + b"\n")  # at once, beside whoever else appends
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return line

    def find(self, section: str, name: str, digest: str) -> Line | None:
        """The measurement, if it is there and no error."""
        for line in reversed(self.lines()):
            if (line["section"], line["name"], line["digest"]) == (section, name, digest) and "error" not in line:
                return line
        return None


@dataclass
class Measuring:
    """One section on its way through the journal. `failed` names what stopped, and the section goes on without it."""

    journal: Journal
    section: str
    digest: str
    failed: list[str]

    def measure(self, name: str, function: Callable[[], Any], *, stands: Callable[[], bool] = lambda: True) -> Any:
        """The values of a measurement: those of the journal, or measured now and written down; None where it failed.

        Args:
            stands: whether what the journal says is still true, of a file that was made say.
        """
        found = self.journal.find(self.section, name, self.digest)
        if found is not None and stands():
            return found["values"]
        begun = time.monotonic()
        try:
            values = function()
        except Exception as error:  # noqa: BLE001 the day goes on, and the journal says what happened
            self.note_error(name, error, time.monotonic() - begun)
            return None
        line = self.journal.append(self.section, name, self.digest, time.monotonic() - begun, values)
        tell(line)
        return line["values"]

    def conclude(self, name: str, function: Callable[[], Any]) -> Any:
        """What follows from measurements: no measurement, so it is made anew each time."""
        return self.measure(name, function, stands=lambda: False)

    def note_error(self, name: str, error: Exception, seconds: float) -> None:
        """A line for what failed."""
        self.failed.append(name)
        kind = "" if isinstance(error, FastvarError) else f"{type(error).__name__}: "
        tell(self.journal.append(self.section, name, self.digest, seconds, error=f"{kind}{error}"))


def tell(line: Mapping[str, Any]) -> None:
    """A line for people."""
    said = f"error: {line['error']}" if "error" in line else json.dumps(line["values"])
    mark = " (stand-in: nonsense)" if line["stand_in"] else ""
    print(f"{line['section']}, {line['name']}: {said[:300]} [{line['seconds']:.1f} s]{mark}", flush=True)


def _ends_whole(descriptor: int) -> bool:
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if size == 0:
        return True
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    return os.read(descriptor, 1) == b"\n"


def _parsed(row: bytes) -> Line | None:
    """A line, or None for what is none: empty, torn, or of something else."""
    try:
        line = json.loads(row)
    except ValueError:
        return None
    whole = isinstance(line, dict) and {"section", "name", "digest", "seconds", "when", "stand_in"} <= line.keys()
    return line if whole and ("values" in line or "error" in line) else None


def _plain(values: Any) -> Any:
    """For JSON, which has no word for numbers that are not finite."""
    if isinstance(values, Mapping):
        return {str(name): _plain(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    if isinstance(values, float) and not math.isfinite(values):
        return str(values)
    if hasattr(values, "item"):  # a number of numpy
        return _plain(values.item())
    return values
