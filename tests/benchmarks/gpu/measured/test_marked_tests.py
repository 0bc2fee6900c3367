"""The tests that need a GPU, run by the day: a line each, and those that passed are not run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.identity import Identity
from benchmarks.gpu.journal import Journal, Measuring
from benchmarks.gpu.measured import marked_tests
from benchmarks.gpu.sections import Context

TESTS = """
import pathlib
import pytest
pytestmark = pytest.mark.gpu
RAN = pathlib.Path(__file__).with_name("ran")
def test_passes(): RAN.open("a").write("passes ")
def test_fails(pytestconfig):
    RAN.open("a").write("fails ")
    assert pytestconfig.cache.mkdir("engines") is None
def test_skips(): pytest.skip("not here")
"""


def test_a_line_each_and_only_what_did_not_pass_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    (tmp_path / "tests" / "test_other.py").write_text("raise RuntimeError('collected')")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    monkeypatch.setattr(marked_tests, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    journal = Journal(tmp_path / "journal.jsonl")
    for _ in range(2):
        log = Measuring(journal, "tests", "d", [])
        marked_tests.measure(Context(tmp_path / "work", Identity("a GPU", "sm90", "", False, "tiny"), log))
        assert [name.rpartition("::")[2] for name in log.failed] == ["test_fails"]
    lines = [(line["name"].rpartition("::")[2], line.get("error", line.get("values"))) for line in journal.lines()]
    assert [name for name, _ in lines] == ["test_passes", "test_fails", "test_skips", "test_fails", "test_skips"]
    assert lines[0][1]["outcome"] == "passed"
    assert "engines" in lines[1][1]
    assert lines[2][1]["outcome"] == "skipped"
    assert "not here" in lines[2][1]["why"]
    assert (tmp_path / "tests" / "ran").read_text().split() == ["passes", "fails", "fails"]
    assert (tmp_path / "work" / "pytest" / "d" / "engines").is_dir(), "engines are kept in the work folder"


def test_files_that_hold_them():
    found = [Path(file).name for file in marked_tests.marked_files()]
    assert "test_on_gpu.py" in found
    assert len(found) < 10
