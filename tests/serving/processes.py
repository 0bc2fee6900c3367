"""A server as its users have it: a process of its own, `fastvar serve` on a port that is free."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
STARTS = 180.0  # seconds, on a machine that is busy with other tests
ENDS = 60.0
LISTENING = re.compile(r"listening on (http://\S+)")


@dataclass
class Served:
    """A running server. `lines`: what it has printed so far, in order of arrival; its log, which is JSON, among it."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)
    _news: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, pattern: str, seconds: float = STARTS) -> re.Match[str]:
        """The first line that holds the pattern; waits for it. Fails with all lines where the process ends before."""
        end = time.monotonic() + seconds
        with self._news:
            while not (found := next(filter(None, (re.search(pattern, line) for line in self.lines)), None)):
                has_ended = self.process.poll() is not None
                left = end - time.monotonic()
                assert left > 0, f"no line with {pattern!r} in {seconds} s:\n" + "\n".join(self.lines)
                assert not has_ended, f"ended with {self.process.returncode}:\n" + "\n".join(self.lines)
                self._news.wait(min(left, 0.2))
        return found

    def read(self, stream: IO[str]) -> None:
        for line in stream:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()


@contextlib.contextmanager
def serving(
    bundle: Path | str | Sequence[Path | str], *options: str, ready: bool = True, module: str = "fastvar.cli"
) -> Iterator[Served]:
    """A server of a bundle, `NAME=FOLDER`, or several of them; ended by SIGTERM when the block is left.

    It is given to the block when its bundles are loaded, or, without `ready`, as soon as it listens. `module`: what is
    run in place of the command.
    """
    bundles = [bundle] if isinstance(bundle, str | Path) else bundle
    command = [sys.executable, "-m", module, "serve", *map(str, bundles), *options]
    command += [] if "--port" in options else ["--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, encoding="utf-8", cwd=ROOT) as process:
        served = Served(process)
        readers = [
            threading.Thread(target=served.read, args=[stream], daemon=True)
            for stream in (process.stdout, process.stderr)
        ]
        for reader in readers:
            reader.start()
        try:
            served.url = served.wait_for(LISTENING.pattern)[1]
            if ready:
                for name in map(_name, bundles):
                    served.wait_for(rf"loaded {re.escape(name)}: ")
            yield served
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDS)
            process.kill()
            for reader in readers:
                reader.join(ENDS)


def _name(bundle: Path | str) -> str:
    name, equals, _ = str(bundle).partition("=")
    return name if equals else Path(bundle).name


@contextlib.contextmanager
def paced(bundle: Path, *options: str, pace: float = 0.3) -> Iterator[Served]:
    """A server that draws image by image, and waits so many seconds before each scale is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACE", str(pace))
        with serving(bundle, "--batch", "1", "--instances", "1", *options, module="tests.serving.paced") as served:
            yield served
