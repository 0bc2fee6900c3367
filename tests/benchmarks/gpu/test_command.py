"""`python -m benchmarks.gpu` around its sections: the process of one, copies, and the beginning of a rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.identity import Identity
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.sections import JOURNAL, LOGS, digest_of, section_named
from fastvar.engines.aotinductor import stand_in_gpu

ROOT = Path(__file__).parents[3]
IDENTITY = Identity("NVIDIA H100", "sm90", "2.11.0", True, "tiny")


def run_section(name: str, work: Path, identity: Identity) -> subprocess.CompletedProcess[str]:
    """As the day runs it, by hand: without a lifeline."""
    line = command.section_command(section_named(name), work, identity)
    assert line.pop() == "--lifeline"
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, stdin=subprocess.DEVNULL)


def test_a_section_in_its_process(tmp_path: Path):
    """cuDNN has no stand-in: the section says that it leaves it out, under the digest that the day knows it by."""
    done = run_section("attention", tmp_path, IDENTITY)
    assert done.returncode == 0, done.stderr
    (line,) = Journal(tmp_path / JOURNAL).lines()
    assert (line["section"], line["name"]) == ("attention", "cudnn")
    assert "no stand-in" in line["values"]["skipped"]
    assert line["digest"] == digest_of(section_named("attention"), IDENTITY)


def test_a_section_that_measured_nothing_fails_and_says_what(tmp_path: Path):
    done = run_section("large", tmp_path, IDENTITY)
    assert done.returncode == 1
    assert done.stdout.strip().splitlines()[-1] == "failed: 2048x2048-fastvar, 960x1920-fastvar"
    assert all("is not a bundle" in line["error"] for line in Journal(tmp_path / JOURNAL).lines())


def test_a_rehearsal_is_this_program_begun_anew(monkeypatch: pytest.MonkeyPatch):
    begun: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(command, "environment", lambda torch, capability: {"HAS": capability})
    monkeypatch.setattr(os, "execve", lambda *arguments: begun.append(arguments))
    monkeypatch.setattr(sys, "argv", ["x", "--stand-in", "sm90", "--model", "tiny"])
    command.with_stand_in(None)
    assert not begun
    command.with_stand_in("sm90")
    ((program, arguments, variables),) = begun
    assert (program, arguments[1:3], arguments[3:]) == (sys.executable, ["-m", "benchmarks.gpu"], sys.argv[1:])
    assert variables["HAS"] == "sm90"
    assert variables["PATH"] == os.environ["PATH"]
    monkeypatch.setenv(stand_in_gpu.FACTS, "9.0")
    command.with_stand_in("sm90")
    assert len(begun) == 1, "and not again where it has begun"


def test_journal_and_logs_are_copied_and_bundles_are_not(tmp_path: Path):
    work = tmp_path / "work"
    (work / LOGS).mkdir(parents=True)
    (work / "bundles").mkdir()
    (work / "bundles" / "x.log").touch()
    (work / JOURNAL).write_text(json.dumps(asdict(IDENTITY)))
    (work / LOGS / "truth.log").write_text("said")
    command.copy_record(work, None)
    command.copy_record(work, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [JOURNAL, "truth.log"]
