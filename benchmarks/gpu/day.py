"""Runs sections one after another, each in a process of its own that ends in time, and writes how each ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.builder import ROOT
from benchmarks.gpu.journal import WHOLE, Journal, tell
from benchmarks.gpu.sections import Section

SHORTEST = 3.0  # seconds: with less left, nothing is begun
LAST_LINES = 2  # of a section's output, in the line that says how it failed


@dataclass
class Day:
    """Args:
    journal: where the ends of sections are written.
    command: of the process of a section. Its stdin is a pipe that closes when this process ends.
    digest: of all that a section depends on.
    logs: folder of what sections print.
    after: called after each section.
    """

    journal: Journal
    command: Callable[[Section], Sequence[str]]
    digest: Callable[[Section], str]
    logs: Path
    after: Callable[[], None] = lambda: None

    def run(self, sections: Sequence[Section], budget_s: float) -> list[str]:
        """All sections in order, within so many seconds together; gives the names of those that did not succeed."""
        deadline, failed = time.monotonic() + budget_s, []
        for section in sections:
            if not self._run_section(section, deadline):
                failed.append(section.name)
            self.after()
        return failed

    def _run_section(self, section: Section, deadline: float) -> bool:
        digest = self.digest(section)
        if not section.makes_files and self.journal.find(section.name, WHOLE, digest) is not None:
            print(f"{section.name}: done before", flush=True)
            return True
        left, begun = deadline - time.monotonic(), time.monotonic()
        error = self._ended(section, min(section.seconds, left)) if left > SHORTEST else "not begun: the time is over"
        spent = time.monotonic() - begun
        values = {"ended": "in time"}
        tell(self.journal.append(section.name, WHOLE, digest, spent, values, error))
        return error is None

    def _ended(self, section: Section, seconds: float) -> str | None:
        """Runs it; None if it succeeded, else what happened."""
        print(f"{section.name}: at most {seconds:.0f} s", flush=True)
        log = self.logs / f"{section.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(section),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=ROOT,
            )
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                return f"cut after {seconds:.0f} s"
            finally:
                _kill_all(process)
        if status == 0:
            return None
        lines = log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
        how = f"exit status {status}" if status > 0 else f"signal {-status}"
        return "\n".join((how, *lines))


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    """A process and those that it started and left behind."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def end_with_parent() -> None:
    """In a section's process: it and all that it started end when whoever started it does, however that ends."""

    pipe = os.dup(0)  # pytest puts another file under that number

    def listen() -> None:
        while os.read(pipe, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    if sys.platform != "win32":
        threading.Thread(target=listen, daemon=True).start()
