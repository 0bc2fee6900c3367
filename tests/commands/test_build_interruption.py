"""Signals in the middle of a build: nothing is left behind, no half bundle, no lock, no worker and no traceback."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fastvar
from fastvar.core.processes.own_process import OwnProcess, end_all
from fastvar.engines.bundle.bundle import Bundle
from tests.console.test_interruption import TOLD, start, wait_for

if not Path("/proc/self/task").is_dir():
    pytest.skip("processes are found through /proc", allow_module_level=True)


def children(pid: int) -> set[int]:
    """Processes that a process has started, and those that they have."""
    found: set[int] = set()
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            found |= {child} | children(child)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def have_ended(processes: set[int], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(is_alive, processes)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_alive, processes))


def start_build(checkpoint: Path, out: Path, jobs: int = 2) -> subprocess.Popen[str]:
    """A build that makes every engine anew, in a group of its own."""
    options = ("--size", "256x256", "--policy", "dense", "--no-cache", "--jobs", jobs, "--out", out)
    return start("build", checkpoint, *options, start_new_session=True)


def importing(process: subprocess.Popen[str], _folder: Path) -> bool:
    """Workers are there, and import torch for seconds."""
    return bool(children(process.pid))


def making_engines(_process: subprocess.Popen[str], folder: Path) -> bool:
    return any(folder.glob(".*/engines"))


def making_alone(process: subprocess.Popen[str], folder: Path) -> bool:
    return making_engines(process, folder) and not children(process.pid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "jobs", "number", "send"),
    [
        (importing, 2, signal.SIGTERM, os.kill),
        (importing, 2, signal.SIGINT, os.killpg),
        (making_engines, 2, signal.SIGHUP, os.kill),
        (making_engines, 2, signal.SIGTERM, os.killpg),
        (making_alone, 1, signal.SIGTERM, os.kill),
    ],
)
def test_nothing_is_left_behind(
    tiny_checkpoint_folder: Path,
    tmp_path: Path,
    stage: Callable[[subprocess.Popen[str], Path], bool],
    jobs: int,
    number: signal.Signals,
    send: Callable[[int, int], None],
):
    process = start_build(tiny_checkpoint_folder, tmp_path / "b", jobs)
    wait_for(lambda: stage(process, tmp_path), process)
    time.sleep(1.0)  # into the work
    workers = children(process.pid)
    send(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (128 + number, f"{TOLD[number]}\n")
    assert os.listdir(tmp_path) == []
    assert have_ended(workers, 0)


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tiny_checkpoint_folder: Path, tmp_path: Path):
    process = start_build(tiny_checkpoint_folder, tmp_path / "b")
    wait_for(lambda: len(children(process.pid)) >= 2, process)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert have_ended(workers)


PARENT = """
import time
from fastvar.core.processes.own_process import OwnProcess
process = OwnProcess("from fastvar import lifeline; r = lifeline.requests(); {work}")
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("work", ["import time; time.sleep(60)", "next(r)", "[x for x in iter(int, 1)]"])
def test_a_process_ends_in_the_middle_of_its_work_when_its_parent_does(work: str):
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(work=work)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.communicate()
    assert have_ended({child})


def test_a_process_that_is_ended_cleans_up(tmp_path: Path):
    orderly = (
        "import tempfile, time\n"
        "from fastvar.core.processes.lifeline import clean_up_when_terminated as clean_up; clean_up()\n"
        f"with tempfile.TemporaryDirectory(dir={str(tmp_path)!r}):\n"
        "    print('ready', flush=True); time.sleep(60)"
    )
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True); time.sleep(60)"
    )
    processes = [OwnProcess(statement) for statement in (orderly, deaf)]
    for process in processes:
        assert process.stdout.readline() == b"ready\n"
    assert len(os.listdir(tmp_path)) == 1
    end_all(processes, 1.0)
    assert os.listdir(tmp_path) == []
    assert [process.poll() for process in processes] == [143, -signal.SIGKILL]


def test_a_build_in_another_thread(tiny_checkpoint, tiny_bundle: Path, tiny_policy: Path, engine_cache: Path, tmp_path):
    def build() -> None:
        fastvar.build(tiny_checkpoint, size="256x256", policy=str(tiny_policy), out=tmp_path / "b", cache=engine_cache)

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    assert Bundle.open(tmp_path / "b").digest == Bundle.open(tiny_bundle).digest
