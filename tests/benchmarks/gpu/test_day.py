"""A day of fake sections: their order, their time boxes, the budget, and that one which fails stops no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu.day import Day
from benchmarks.gpu.identity import Identity
from benchmarks.gpu.journal import WHOLE, Journal
from benchmarks.gpu.sections import HERE, SECTIONS, Section, digest_of, modules_behind, section_named
from fastvar.errors import InputError

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the GPU's day is for Linux")
SLEEP = "import time; time.sleep(60)"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


@pytest.fixture
def day(journal: Journal, tmp_path: Path) -> Callable[..., Day]:
    def make(codes: dict[str, str], digests: dict[str, str] | None = None, **arguments) -> Day:
        """Sections by name, each a piece of Python, which notes itself in a file."""

        def command(section: Section) -> list[str]:
            note = f"open({str(tmp_path / 'ran')!r}, 'a').write({section.name + ' '!r})\n"
            return [sys.executable, "-c", note + codes[section.name]]

        return Day(journal, command, lambda s: (digests or {}).get(s.name, "d"), tmp_path / "logs", **arguments)

    return make


def sections(*names: str, seconds: float = 30, **arguments) -> list[Section]:
    return [Section(name, seconds, name, **arguments) for name in names]


def ran(tmp_path: Path) -> list[str]:
    path = tmp_path / "ran"
    return path.read_text().split() if path.exists() else []


def ends(journal: Journal) -> dict[str, str]:
    return {line["section"]: line.get("error", "done") for line in journal.lines() if line["name"] == WHOLE}


def test_in_order_and_a_failing_one_stops_no_other(day, journal: Journal, tmp_path: Path):
    codes = {"first": "", "second": "print('so'); raise SystemExit(3)", "third": ""}
    after: list[int] = []
    failed = day(codes, after=lambda: after.append(len(journal.lines()))).run(sections(*codes), 60)
    assert (failed, ran(tmp_path), after) == (["second"], list(codes), [1, 2, 3])
    assert ends(journal) == {"first": "done", "second": "exit status 3\nso", "third": "done"}


def test_one_that_dies_of_a_signal_is_told(day, journal: Journal):
    day({"first": "import os; os.kill(os.getpid(), 11)"}).run(sections("first"), 60)
    assert ends(journal)["first"].startswith("signal 11")


def test_the_time_box_cuts_it_with_all_that_it_started(day, journal: Journal, tmp_path: Path):
    child = f"import os, time; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    starts = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]); " + SLEEP
    begun = time.monotonic()
    failed = day({"long": starts, "next": ""}).run([*sections("long", seconds=4), *sections("next")], 60)
    assert time.monotonic() - begun < 30
    assert (failed, ends(journal)) == (["long"], {"long": "cut after 4 s", "next": "done"})
    assert gone(int((tmp_path / "child").read_text()))


def test_the_budget_cuts_too_and_what_is_behind_is_not_begun(day, journal: Journal, tmp_path: Path):
    failed = day({"long": SLEEP, "next": ""}).run(sections("long", "next"), 4)
    assert (failed, ran(tmp_path)) == (["long", "next"], ["long"])
    assert ends(journal) == {"long": "cut after 4 s", "next": "not begun: the time is over"}


def test_what_is_done_is_not_run_again(day, journal: Journal, tmp_path: Path):
    codes = {"first": "", "second": "raise SystemExit(1)", "third": "", "files": ""}
    wanted = [*sections("first", "second", "third"), *sections("files", makes_files=True)]
    day(codes).run(wanted, 60)
    (tmp_path / "ran").unlink()
    day({**codes, "second": ""}, {"third": "other"}).run(wanted, 60)
    assert ran(tmp_path) == ["second", "third", "files"], "failed, of another digest, and with files that may be gone"
    assert set(ends(journal).values()) == {"done"}


def test_a_section_ends_with_the_day_however_that_ends(tmp_path: Path):
    """The day is killed; the process of the section and its child notice."""
    pids = tmp_path / "pids"
    child = f"import os, time; open({str(pids)!r}, 'a').write(str(os.getpid()) + ' '); time.sleep(60)"
    section = (
        "from benchmarks.gpu.day import end_with_parent; end_with_parent(); import subprocess, sys;"
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); {child}"
    )
    program = (
        "import sys; from pathlib import Path; from benchmarks.gpu.day import Day;"
        "from benchmarks.gpu.journal import Journal; from benchmarks.gpu.sections import Section;"
        f"Day(Journal(Path({str(tmp_path / 'j')!r})), lambda s: [sys.executable, '-c', {section!r}], lambda s: 'd',"
        f"Path({str(tmp_path)!r})).run([Section('a', 50, 'a')], 50)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while (not pids.exists() or len(pids.read_text().split()) < 2) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = [int(pid) for pid in pids.read_text().split()]
    assert len(found) == 2
    assert all(gone(pid) for pid in found)


def test_a_section_may_put_another_file_in_place_of_its_standard_input():
    """As pytest does: whoever listens for the day's end goes on listening to the day."""
    section = (
        "import os, sys, time; from benchmarks.gpu.day import end_with_parent; end_with_parent();"
        "os.dup2(os.open(os.devnull, os.O_RDONLY), 0); print('begun', flush=True); time.sleep(0.5); print('alive')"
    )
    command = [sys.executable, "-c", section]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        process.stdin.write(b" ")  # it reads once more
        assert process.stdout.read() == b"alive\n"


def gone(pid: int) -> bool:
    """Within some seconds; a zombie that nobody waits for is gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_sections_come_in_the_order_of_truth_a_minute():
    names = [section.name for section in SECTIONS]
    assert names[:5] == ["build", "truth", "speed", "large", "eager"]
    assert names[-1] == "tensorrt"
    assert all((ROOT / "benchmarks" / "gpu" / "measured" / f"{section.module}.py").is_file() for section in SECTIONS)
    with pytest.raises(InputError, match="truth"):
        section_named("lies")


def test_a_digest_depends_on_machine_library_model_and_section():
    identity = Identity("a GPU", "sm90", "2.11.0", False, "tiny")
    found = {
        digest_of(section_named("truth"), identity),
        digest_of(section_named("speed"), identity),
        *(
            digest_of(section_named("truth"), Identity(**{**vars(identity), **change}))
            for change in ({"gpu": "another"}, {"torch": "2.13.0"}, {"model": "infinity_2b"}, {"stand_in": True})
        ),
    }
    assert len(found) == 6
    assert digest_of(section_named("truth"), identity) in found


def test_and_on_the_source_behind_the_section_alone():
    found = {
        section.name: {path.stem for path in modules_behind(HERE / "measured" / f"{section.module}.py")}
        for section in SECTIONS
    }
    assert {"truth", "drawing", "recipes", "timing", "contenders"} <= found["truth"]
    assert {"against_eager", "rounds", "eager", "models", "machine_peak"} <= found["eager"]
    assert "eager" not in found["tests"]
    for section in SECTIONS:
        others = {other.module for other in SECTIONS} - {section.module}
        assert not others & found[section.name], "to mend one section measures no other again"
