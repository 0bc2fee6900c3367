"""Section "tests": the tests that need a GPU, a line each."""

from __future__ import annotations

from typing import Any

from benchmarks.builder import ROOT
from benchmarks.gpu.sections import Context

MARK = "pytest.mark.gpu"


class Recorder:
    """A plugin of pytest that writes how each test ended."""

    def __init__(self, context: Context) -> None:
        self._log = context.log

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and not (report.when == "setup" and report.outcome != "passed"):
            return
        if report.outcome == "failed":
            self._log.note_error(report.nodeid, AssertionError(str(report.longrepr)), report.duration)
            return
        why = {"why": str(report.longrepr[2])} if isinstance(report.longrepr, tuple) else {}
        self._log.conclude(report.nodeid, lambda: {"outcome": report.outcome, "test_s": report.duration, **why})

    def pytest_collection_modifyitems(self, items: list[Any], config: Any) -> None:
        """Tests that passed before are not run again."""
        left = [item for item in items if not self._passed(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left

    def _passed(self, test: str) -> bool:
        found = self._log.journal.find(self._log.section, test, self._log.digest)
        return found is not None and found["values"]["outcome"] == "passed"


def measure(context: Context) -> None:
    """Engines are kept where pytest keeps what it keeps: in the work folder here."""
    import pytest

    arguments = ["-q", "-m", "gpu", "-p", "no:xdist", "-o", f"cache_dir={context.work / 'pytest'}"]
    status = pytest.main([*arguments, *marked_files()], plugins=[Recorder(context)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with status {int(status)}")


def marked_files() -> list[str]:
    """Files with such tests: to collect all others takes half a minute."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if MARK in file.read_text(encoding="utf-8")]
