"""Processes of our own: the same Python with this very package, however its parent came to import it.

A plain subprocess looks for the package anew, and in another folder or on another path finds another one.
`multiprocessing` would import the caller's main module again, which a script without a guard does not survive.
How such a process answers requests, and ends with its parent, is in lifeline.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

PATIENCE = 5.0  # seconds
# Signals to our group, Ctrl-C say, are for us alone to answer.
_OWN_GROUP: dict[str, Any] = {"start_new_session": True}
if sys.platform == "win32":
    _OWN_GROUP = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
PACKAGE = __name__.partition(".")[0]
KEPT, TOLD = 100, 5  # of a process's stderr: lines that are kept, and of those the ones that tell of its death

# The package goes by where it lies, all else by the parent's search path.
_START = """
import sys
sys.path[:] = {path!r}
import importlib.util
spec = importlib.util.spec_from_file_location({package!r}, {init!r}, submodule_search_locations=[{root!r}])
sys.modules[{package!r}] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
"""


class OwnProcess:
    """A Python that runs a statement with this package, by where it lies, and the parent's search path.

    stdin and stdout are pipes of bytes. `variables` are put into its environment. The last lines of its stderr go
    to the parent's when it has ended, unless they are told with its death.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, statement: str, arguments: Sequence[str] = (), variables: Mapping[str, str] | None = None
    ) -> None:
        root = str(Path(__file__).resolve().parents[2])
        init = os.path.join(root, "__init__.py")
        code = _START.format(path=_search_path(), package=PACKAGE, init=init, root=root) + statement
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", code, *arguments]
        environment = {**os.environ, **(variables or {})}
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment, **_OWN_GROUP)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin, self._process.stdout
        self._last: deque[str] = deque(maxlen=KEPT)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self._process.poll()

    def end(self, patience: float = 0.0) -> None:
        """Stop it, if it has not ended: asked first, if it is given seconds to clean up."""
        if patience:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        self._process.kill()
        self._process.wait()
        for pipe in (self.stdin, self.stdout):
            _close(pipe)
        for line in self._said():
            print(line, file=sys.stderr)

    def death(self) -> tuple[str, str]:
        """How it ended, in words that follow "the process", and what may help. One that still runs is stopped."""
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.end()
            return "stopped answering", "try again"
        said = "".join(f"\n  {line}" for line in self._said()[-TOLD:])
        if code == -getattr(signal, "SIGKILL", 9):
            return "was killed (signal 9)" + said, "the system may have run out of memory: build with --jobs 1"
        if code < 0:
            return f"died of signal {-code} ({_signal_name(-code)})" + said, "build with --jobs 1 to see where"
        return f"died with code {code}" + said, "mend what it says" if said else "build with --jobs 1 to see where"

    def terminate(self) -> None:
        """Ask it to end in order."""
        self._process.terminate()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last.append(line.decode(errors="replace").rstrip())
        self._process.stderr.close()

    def _said(self) -> list[str]:
        """What has not been told yet."""
        self._listener.join(PATIENCE)  # a compiler that it started may hold the pipe open
        lines = list(self._last)
        self._last.clear()
        return lines


def end_all(processes: Sequence[OwnProcess], patience: float = PATIENCE) -> None:
    """Ask processes to end, and stop those that have not after so many seconds together."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        process.end(max(0.01, deadline - time.monotonic()))


def _search_path() -> list[str]:
    """The parent's, absolute: an empty entry means the folder that it is in now, unless that is gone."""
    found = []
    for entry in sys.path:
        try:
            found.append(os.path.abspath(entry))
        except FileNotFoundError:
            continue
    return found


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _close(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except OSError:  # what was not flushed has no reader any more
        return
