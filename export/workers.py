"""Processes that run build tasks, one after another. They speak pickle over pipes with whoever started them."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import IO, Any

from ..core.platform import needs_extra
from ..core.processes import lifeline
from ..core.processes.lifeline import clean_up_when_terminated, read_frame, write_frame
from ..core.processes.own_process import OwnProcess, end_all
from ..core.provenance import ROOT, source_digest
from ..core.version import __version__
from ..errors import BuildError, FastvarError
from .tasks import BuildResult, BuildTask

Run = Callable[[BuildTask], BuildResult]
Results = Generator[tuple[str, BuildResult], None, None]
# It listens before it imports torch: a parent that ends meanwhile ends it too.
STATEMENT = f"""
import {lifeline.__name__} as lifeline
orders = lifeline.requests()
import {__name__} as workers
workers.serve(orders)
"""


def identity() -> dict[str, str]:
    """Which fastvar this is: parent and worker must be the same, down to the source."""
    steps = f"{__package__}.models.registry"
    return {"version": __version__, "folder": str(ROOT.resolve()), "source": source_digest(__name__, steps)}


class Worker:
    """A process that runs build tasks.

    Raises:
        BuildError: it cannot be started, dies, or imports another fastvar than this process.
    """

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        try:
            self.process = OwnProcess(STATEMENT, variables=variables)
        except OSError as error:
            raise BuildError(
                f"no process for a worker: {error.strerror or error}", fix="build with --jobs 1"
            ) from error
        self._greeted = False

    def run(self, task: BuildTask) -> BuildResult:
        try:
            if not self._greeted:
                self._check(_receive(self.process.stdout))
            _send(self.process.stdin, task)
            result = _receive(self.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            how, fix = self.process.death()
            raise BuildError(f"the worker that traced {task.graph.name} {how}", fix=fix) from error
        if isinstance(result, FastvarError):
            raise result
        if not isinstance(result, BuildResult):
            raise RuntimeError(f"worker failed on {task.graph.name}:\n{result}")
        return result

    def close(self) -> None:
        self.process.end()

    def _check(self, found: Any) -> None:
        self._greeted = True
        own = identity()
        if found == own:
            return
        self.process.end()
        names = [name for name in own if not isinstance(found, dict) or found.get(name) != own[name]]
        raise BuildError(
            f"a worker is not of the fastvar that started it: {', '.join(names)} differ",
            expected=f"fastvar {__version__} in {own['folder']}, as it was when this process imported it",
            fix="start the program again; if that does not help, build with --jobs 1",
        )


def run_here(tasks: dict[str, BuildTask]) -> Results:
    """In the calling thread, so that a signal stops it."""
    for name, task in tasks.items():
        yield name, task.run()


def run_apart(tasks: dict[str, BuildTask], workers: int, variables: Mapping[str, str] | None = None) -> Results:
    """By workers, a thread for each, as they are ready; `variables` are put into their environment."""
    with ThreadPoolExecutor(workers) as pool, _runners(variables) as run:
        futures = {pool.submit(run, task): name for name, task in tasks.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def _runners(variables: Mapping[str, str] | None) -> Iterator[Run]:
    """A function that runs a task in the calling thread's own process."""
    local, gate, ended = threading.local(), threading.Lock(), threading.Event()
    started: list[Worker] = []

    def run(task: BuildTask) -> BuildResult:
        with gate:  # none starts behind the back of who ends them
            if ended.is_set():
                raise RuntimeError("the build has ended")
            if not hasattr(local, "worker"):
                local.worker = Worker(variables)
                started.append(local.worker)
        result: BuildResult = local.worker.run(task)
        return result

    try:
        yield run
    except BaseException:  # they may be at work
        with gate:
            ended.set()
        end_all([worker.process for worker in started])
        raise
    finally:
        for worker in started:
            worker.close()


def serve(orders: Iterable[bytes]) -> None:
    """The worker's loop. Whatever libraries print goes to stderr: stdout carries the answers."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    clean_up_when_terminated()
    _send(answers, identity())
    for order in orders:
        try:
            task: BuildTask = pickle.loads(order)
            with needs_extra("export"):
                result = task.run()
            _send(answers, result)
        except FastvarError as error:
            _send(answers, error)
        except Exception:  # noqa: BLE001 handed to the parent whole, as the bug it is
            import traceback

            _send(answers, traceback.format_exc())


def _send(pipe: IO[bytes], value: Any) -> None:
    write_frame(pipe, pickle.dumps(value))


def _receive(pipe: IO[bytes]) -> Any:
    return pickle.loads(read_frame(pipe))
