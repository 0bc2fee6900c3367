"""Processes that run build tasks, one after another. They speak pickle over pipes with whoever started them."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from .. import __version__
from ..errors import BuildError, FastvarError
from ..processes import OwnProcess
from ..provenance import ROOT, source_digest
from .tasks import BuildResult, BuildTask

Run = Callable[[BuildTask], BuildResult]
# Ctrl-C reaches the whole group: the parent answers it, and ends its workers itself.
STATEMENT = f"""
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
import {__name__} as workers
workers.serve()
"""


def identity() -> dict[str, str]:
    """Which fastvar this is: parent and worker must be the same, down to the source."""
    steps = f"{__package__}.wirings"
    return {"version": __version__, "folder": str(ROOT.resolve()), "source": source_digest(__name__, steps)}


class Worker:
    """A process that runs build tasks.

    Raises:
        BuildError: it cannot be started, dies, or imports another fastvar than this process.
    """

    def __init__(self) -> None:
        try:
            self._process = OwnProcess(STATEMENT)
        except OSError as error:
            raise BuildError(
                f"no process for a worker: {error.strerror or error}", fix="build with --jobs 1"
            ) from error
        self._greeted = False

    def run(self, task: BuildTask) -> BuildResult:
        try:
            if not self._greeted:
                self._check(_receive(self._process.stdout))
            _send(self._process.stdin, task)
            result = _receive(self._process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            how, fix = self._process.death()
            raise BuildError(f"the worker that traced {task.graph.name} {how}", fix=fix) from error
        if isinstance(result, FastvarError):
            raise result
        if not isinstance(result, BuildResult):
            raise RuntimeError(f"worker failed on {task.graph.name}:\n{result}")
        return result

    def close(self) -> None:
        self._process.end()

    def _check(self, found: Any) -> None:
        self._greeted = True
        own = identity()
        if found == own:
            return
        self._process.end()
        names = [name for name in own if not isinstance(found, dict) or found.get(name) != own[name]]
        raise BuildError(
            f"a worker is not of the fastvar that started it: {', '.join(names)} differ",
            expected=f"fastvar {__version__} in {own['folder']}, as it was when this process imported it",
            fix="start the program again; if that does not help, build with --jobs 1",
        )


@contextmanager
def runners(workers: int) -> Iterator[Run]:
    """A function that runs a task: here for no or one worker, else in the calling thread's own process."""
    if workers < 2:
        yield BuildTask.run
        return
    local, started = threading.local(), []

    def run(task: BuildTask) -> BuildResult:
        if not hasattr(local, "worker"):
            local.worker = Worker()
            started.append(local.worker)
        result: BuildResult = local.worker.run(task)
        return result

    try:
        yield run
    finally:
        for worker in started:
            worker.close()


def serve() -> None:
    """The worker's loop. Whatever libraries print goes to stderr: stdout carries the answers."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _send(answers, identity())
    while True:
        try:
            task: BuildTask = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(answers, task.run())
        except FastvarError as error:
            _send(answers, error)
        except Exception:  # noqa: BLE001 handed to the parent whole, as the bug it is
            import traceback

            _send(answers, traceback.format_exc())


def _send(pipe: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    header = pipe.read(8)
    if len(header) < 8:
        raise EOFError
    return pickle.loads(pipe.read(int.from_bytes(header, "little")))
