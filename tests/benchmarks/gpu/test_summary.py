"""The record of a day, and that none is ever written of a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.builder import RESULTS
from benchmarks.gpu.journal import Journal, Measuring
from benchmarks.gpu.summary import record_of, text_of, write_record
from fastvar.engines.aotinductor import stand_in_gpu
from fastvar.errors import InputError

ROOT = Path(__file__).parents[3]
NO_GPU = not Path("/proc/driver/nvidia/version").exists()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """Of a day: a GPU, something that was mended, something that failed, something untrue."""
    journal = Journal(tmp_path / "journal.jsonl")

    def fail():
        raise ValueError("too slow\nmore")

    Measuring(journal, "build", "d", []).measure("machine", lambda: {"gpu": "NVIDIA H200 (SXM)"})
    speed = Measuring(journal, "speed", "d", [])
    speed.measure("a", fail)
    speed.measure("a", lambda: {"scales_ms": 12.34567, "scales": [1, 2]})
    speed.measure("b", fail)
    untrue = {"ok": False, "logits_relative_error": [0.5, 0.25]}
    Measuring(journal, "truth", "d", []).measure("bf16", lambda: untrue)
    journal.append("speed", "whole", "d", 30.0, error="exit status 1")
    return journal


def test_the_latest_line_of_every_measurement(journal: Journal, tmp_path: Path):
    path = write_record(journal.lines(), tmp_path / "results")
    assert path is not None
    assert path.name == "gpu-nvidia-h200-sxm-aotinductor.json"
    record = json.loads(path.read_text())
    assert record["gpu"] == "NVIDIA H200 (SXM)"
    assert record["sections"]["speed"]["a"]["values"]["scales_ms"] == 12.34567
    assert record["failed"] == ["speed: b", "speed: whole", "truth: bf16"]


def test_in_lines_for_people(journal: Journal):
    text = text_of(record_of(journal.lines())).splitlines()
    assert "  a: scales_ms 12.35" in text
    assert "  b: error: ValueError: too slow" in text
    assert "speed: exit status 1 (30 s)" in text
    assert "  bf16: ok False, worst scale 0.5" in text
    assert text[-1] == "failed: 3"
    assert "nonsense" not in "\n".join(text)


def test_one_line_of_a_stand_in_is_enough(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setenv(stand_in_gpu.FACTS, "9.0")
        Measuring(journal, "speed", "other", []).measure("c", lambda: {"scales_ms": 1.0})
    assert write_record(journal.lines(), tmp_path / "results") is None
    assert not (tmp_path / "results").exists()
    assert "nonsense" in text_of(record_of(journal.lines())).splitlines()[0]


def test_a_line_that_does_not_say_is_no_truth(journal: Journal, tmp_path: Path):
    lines = [{**line, "stand_in": None} if line["name"] == "a" else line for line in journal.lines()]
    assert write_record(lines, tmp_path / "results") is None


def test_an_empty_journal_has_no_record(tmp_path: Path):
    with pytest.raises(InputError, match="nothing was measured"):
        write_record([], tmp_path)


def command(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **variables})


def test_a_summary_of_a_rehearsal_is_printed_and_not_written(journal: Journal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(stand_in_gpu.FACTS, "9.0")
    Measuring(journal, "speed", "other", []).measure("c", lambda: {"scales_ms": 1.0})
    monkeypatch.delenv(stand_in_gpu.FACTS)
    before = sorted(RESULTS.iterdir())
    done = command("--summary", "--work", journal.path.parent)
    assert done.returncode == 1, "something failed"
    assert "all figures are nonsense" in done.stdout
    assert "no record is written" in done.stdout
    assert sorted(RESULTS.iterdir()) == before


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path):
    done = command("--work", tmp_path / "work")
    assert done.returncode == 2
    assert "NVIDIA" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "work").exists()
