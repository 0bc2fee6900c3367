"""Signals in the middle of a command: what was drawn is on the disk, and the end is told in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from fastvar.console.interruption import Interrupted, ended_by_signals, signals_deferred

if os.name == "nt":
    pytest.skip("Windows ends processes otherwise", allow_module_level=True)

COMMAND = [sys.executable, "-m", "fastvar"]
TOLD = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # As from a terminal, whatever started the tests ignores.
    listening = {"preexec_fn": lambda: [signal.signal(number, signal.SIG_DFL) for number in TOLD]}
    return subprocess.Popen([*COMMAND, *map(str, arguments)], **{**pipes, **listening, **options})


def wait_for(conditioning, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not conditioning():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def images(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png")) if folder.is_dir() else []


@pytest.mark.parametrize("number", TOLD)
def test_what_was_drawn_is_on_the_disk(tiny_bundle: Path, tmp_path: Path, number: signal.Signals):
    out = tmp_path / "out"
    process = start("generate", tiny_bundle, *["red"] * 200, "--seed", 1, "--out", out)
    wait_for(lambda: len(images(out)) >= 3, process)
    process.send_signal(number)
    printed, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (128 + number, f"{TOLD[number]}\n")
    assert set(os.listdir(out)) == {path.name for path in images(out)}  # and nothing half
    assert 3 <= len(images(out)) < 200
    assert len(printed.splitlines()) == len(images(out))
    for path in images(out):
        with Image.open(path) as image:
            image.load()


def test_editing_saves_as_it_draws_too(editing_bundle: Path, tmp_path: Path):
    Image.effect_noise((64, 64), 60).save(tmp_path / "small.png")
    out = tmp_path / "out"
    process = start("upscale", editing_bundle, tmp_path / "small.png", "a circle", "-n", 500, "--out", out)
    wait_for(lambda: images(out), process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert 1 <= len(images(out)) < 500


@pytest.mark.parametrize("number", TOLD)
def test_a_profile_ends_in_words_with_all_that_it_started(tiny_bundle: Path, tmp_path: Path, number: signal.Signals):
    """In the whole group, as from a terminal, while a process of its own measures memory."""
    options = {"cwd": tmp_path, "start_new_session": True}
    process = start("profile", tiny_bundle, "--runs", 1000, **options)
    time.sleep(2.0)
    os.killpg(process.pid, number)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (128 + number, f"{TOLD[number]}\n")


def test_a_signal_that_the_parent_ignores_stays_ignored(tiny_bundle: Path, tmp_path: Path):
    out = tmp_path / "out"
    ignoring = {"preexec_fn": lambda: [signal.signal(number, signal.SIG_IGN) for number in TOLD]}
    process = start("generate", tiny_bundle, *["red"] * 20, "--out", out, **ignoring)
    wait_for(lambda: images(out), process)
    for number in TOLD:
        process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told, len(images(out))) == (0, "", 20)


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    prelude = (
        "import os, signal, sys, time\nfrom fastvar.console.interruption import *\n"
        "from fastvar.console.interruption import SAME_REQUEST_SECONDS\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    )
    return subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("number", TOLD)
def test_a_second_signal_ends_at_once(number: signal.Signals):
    done = run_code(f"""
with ended_by_signals():
    try:
        signal.raise_signal({int(number)})
    finally:
        signal.raise_signal({int(number)})  # the same request: timeout sends SIGTERM to a process and to its group
        print("cleaning up", flush=True)
        time.sleep(SAME_REQUEST_SECONDS)
        signal.raise_signal({int(number)})
        print("cleaned up", flush=True)
""")
    assert (done.returncode, done.stdout, done.stderr) == (-number, "cleaning up\n", "")


def test_a_deferred_signal_waits_for_the_block_and_is_the_same():
    done = run_code("""
try:
    with ended_by_signals():
        with signals_deferred():
            signal.raise_signal(signal.SIGTERM)
            print("saved")
        print("drew on")
except Interrupted as end:
    print(end, end.exit_code)
""")
    assert done.stdout == "saved\nterminated 143\n"


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in TOLD]
    with ended_by_signals(), signals_deferred():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in TOLD] == before


def test_in_other_threads_nothing_is_changed():
    done = run_code("""
import threading
def work():
    with ended_by_signals(), signals_deferred():
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
thread = threading.Thread(target=work)
thread.start()
thread.join()
""")
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_nothing_on_the_way_takes_it_for_its_own():
    assert not issubclass(Interrupted, Exception | KeyboardInterrupt)


def test_an_interrupt_while_the_command_is_imported_is_no_traceback(tmp_path: Path):
    (tmp_path / "typer.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    process = start("--version", env=environment)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130
