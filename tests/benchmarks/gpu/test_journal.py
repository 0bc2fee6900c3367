"""The journal: appended line by line, torn by whoever is killed, and read again all the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.journal import LONGEST_ERROR, Journal, Measuring
from fastvar.engines.aotinductor import stand_in_gpu
from fastvar.errors import InputError

# Writes two lines and half of a third, and is killed.
TORN = """
import os, signal, sys
from pathlib import Path
from benchmarks.gpu.journal import Journal, Measuring
log = Measuring(Journal(Path(sys.argv[1])), "speed", "d", [])
log.measure("a", lambda: 1)
log.measure("b", lambda: 2)
write = os.write
def half(descriptor, data):
    write(descriptor, data[:len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = half
log.measure("c", lambda: 3)
"""


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "work" / "journal.jsonl")


def measuring(journal: Journal, digest: str = "d") -> Measuring:
    return Measuring(journal, "speed", digest, [])


def names(journal: Journal) -> list[str]:
    return [line["name"] for line in journal.lines()]


def test_a_line_is_on_the_disk_as_soon_as_it_was_measured(journal: Journal):
    log = measuring(journal)
    assert log.measure("a", lambda: {"ms": 1.5, "sizes": (1, 2)}) == {"ms": 1.5, "sizes": [1, 2]}
    (line,) = [json.loads(row) for row in journal.path.read_text().splitlines()]
    assert {name: line[name] for name in ("section", "name", "digest", "values", "stand_in")} == {
        "section": "speed",
        "name": "a",
        "digest": "d",
        "values": {"ms": 1.5, "sizes": [1, 2]},
        "stand_in": False,
    }
    assert line["seconds"] >= 0
    assert line["when"].endswith("+00:00")


def test_what_is_there_is_not_measured_again(journal: Journal):
    measuring(journal).measure("a", lambda: 1)
    assert measuring(journal).measure("a", lambda: pytest.fail("measured again")) == 1
    assert names(journal) == ["a"]


def test_under_another_digest_it_is(journal: Journal):
    measuring(journal).measure("a", lambda: 1)
    assert measuring(journal, "other").measure("a", lambda: 2) == 2
    assert measuring(journal).measure("a", lambda: pytest.fail("measured again")) == 1, "that of its own digest"


def test_what_follows_from_measurements_is_made_anew(journal: Journal):
    assert [measuring(journal).conclude("ratio", lambda value=value: value) for value in (1, 2)] == [1, 2]


def test_what_no_longer_stands_is_measured_again(journal: Journal):
    measuring(journal).measure("a", lambda: 1)
    assert measuring(journal).measure("a", lambda: 2, stands=lambda: False) == 2


def test_an_error_is_a_line_and_is_tried_again(journal: Journal):
    log = measuring(journal)

    def fail():
        raise ValueError("x" * (LONGEST_ERROR + 10))

    def refuse():
        raise InputError("no such thing", fix="another")

    assert log.measure("a", fail) is None
    assert log.measure("b", refuse) is None
    assert log.failed == ["a", "b"]
    first, second = journal.lines()
    assert len(first["error"]) == LONGEST_ERROR
    assert second["error"] == "no such thing\nfix: another"
    assert measuring(journal).measure("a", lambda: 3) == 3


def test_numbers_that_are_not_finite_are_said_in_words(journal: Journal):
    assert measuring(journal).measure("a", lambda: [float("nan"), float("inf")]) == ["nan", "inf"]
    assert "NaN" not in journal.path.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_writer_killed_in_the_middle_of_a_line_loses_that_line_alone(journal: Journal):
    done = subprocess.run([sys.executable, "-c", TORN, str(journal.path)], check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == -9
    assert not journal.path.read_bytes().endswith(b"\n"), "it was torn"
    assert names(journal) == ["a", "b"]
    log = measuring(journal)
    assert [log.measure(name, lambda: 4) for name in "abc"] == [1, 2, 4]
    assert names(journal) == ["a", "b", "c"]


def test_lines_of_something_else_count_for_nothing(journal: Journal):
    journal.path.parent.mkdir()
    journal.path.write_bytes(b'[1]\n"x"\n{"section": "speed"}\n\xff\n\n')
    assert journal.lines() == []
    measuring(journal).measure("a", lambda: 1)
    assert names(journal) == ["a"]


def test_a_stand_ins_line_says_so(journal: Journal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(stand_in_gpu.FACTS, "9.0")
    measuring(journal).measure("a", lambda: 1)
    assert journal.lines()[0]["stand_in"] is True
