"""What a command prints must not stop what it does: closed pipes, full disks, narrow encodings, odd terminals."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.console.streams import SparedStream, check_printed, spared_streams
from fastvar.errors import InputError
from fastvar.runtime.images.formats import read_metadata

POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has neither /dev/full nor pseudo terminals")
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
COMMAND = [sys.executable, "-m", "fastvar"]


def run_to(stdout: object, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, **options)


@pytest.fixture
def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def test_a_reader_that_goes_away_stops_nothing(tiny_bundle: Path, tmp_path: Path, closed_pipe: int):
    out = tmp_path / "out"
    done = run_to(closed_pipe, "generate", tiny_bundle, "a red circle", "blue", "green", "--out", out, "--timings")
    assert (done.returncode, done.stderr, len(os.listdir(out))) == (0, "", 3)


@FULL
def test_a_full_stdout_stops_nothing(tiny_bundle: Path, tmp_path: Path):
    out = tmp_path / "out"
    with open("/dev/full", "w") as full:
        done = run_to(full, "generate", tiny_bundle, "a red circle", "blue", "--out", out, "--timings")
    assert (done.returncode, done.stderr, len(os.listdir(out))) == (0, "", 2)


@POSIX
def test_a_closed_stdout_and_stderr_stop_nothing(tiny_bundle: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = [*COMMAND, "generate", str(tiny_bundle), "a red circle", "blue", "--out", str(out)]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], check=False)
    assert (done.returncode, len(os.listdir(out))) == (0, 2)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_an_encoding_does_not_have_is_escaped(tiny_bundle: Path, tmp_path: Path, encoding: str):
    narrow = {"env": {**os.environ, "PYTHONIOENCODING": encoding}, "cwd": tmp_path}
    done = run_to(subprocess.PIPE, "generate", tiny_bundle, "猫", "--seed", 1, "--timings", **narrow)
    told = "warning: the tokenizer does not know: '\\u732b' (prompt); nothing of the prompt is known\n"
    assert done.returncode == 0
    assert done.stderr in (told, told.replace("\\u732b", "猫"))
    assert "wrote \\u732b-1.png (seed 1" in done.stdout
    assert read_metadata(tmp_path / "猫-1.png")["prompt"] == "猫"


@FULL
@pytest.mark.parametrize("options", [("inspect",), ("inspect", "--json")])
def test_a_product_that_cannot_be_printed_is_an_error(tiny_bundle: Path, options: tuple[str, ...], closed_pipe: int):
    verb, *rest = options
    with open("/dev/full", "w") as full:
        done = run_to(full, verb, tiny_bundle, *rest)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to stdout: No space left on device")
    assert "Traceback" not in done.stderr
    done = run_to(closed_pipe, verb, tiny_bundle, *rest)  # the reader had enough
    assert (done.returncode, done.stderr) == (0, "")


def test_a_prompt_that_is_no_text_is_told_in_words(tiny_bundle: Path, tmp_path: Path):
    if os.name == "nt":
        pytest.skip("arguments are text there")
    arguments = [*COMMAND, "generate", str(tiny_bundle), "one", b"r\xf6d", "--out", str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "not valid Unicode" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@POSIX
@pytest.mark.parametrize(
    "variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": ""}, {"COLUMNS": "0"}, {"COLUMNS": "x"}, {"LINES": "0"}]
)
def test_odd_terminals(tiny_bundle: Path, tmp_path: Path, variables: dict[str, str]):
    """Of no size, as in a container."""
    import pty

    ours, theirs = pty.openpty()
    environment = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [*COMMAND, "generate", str(tiny_bundle), "a red circle", "blue", "--out", str(tmp_path), "--timings"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, **variables})
    os.close(theirs)
    printed = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # as Linux tells that the other side is closed
            break
        if not block:
            break
        printed += block
    os.close(ours)
    assert process.wait(60) == 0
    assert b"Traceback" not in printed
    assert len(os.listdir(tmp_path)) == 2


class Failing(io.StringIO):
    def write(self, _text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_stream_is_lost_once_and_for_all():
    stream = SparedStream(Failing())
    assert stream.write("one") == 3
    stream.writelines(["two", "three"])
    stream.flush()
    assert stream.lost is not None
    assert stream.lost.errno == errno.EIO
    assert stream.readable()  # all else is the stream's own


def test_streams_are_put_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    before = sys.stderr
    with spared_streams():
        assert sys.stdout is None
        assert sys.stderr is not before
        check_printed()
    assert sys.stderr is before


def test_check_printed_tells_what_was_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", Failing())
    with spared_streams():
        print("facts")
        with pytest.raises(InputError, match="cannot write to stdout: Input/output error"):
            check_printed()
