"""A function in a fresh process: what it takes of memory, and what it leaves behind, is its own."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ..errors import DeviceMemoryError

Result = TypeVar("Result")


def run_apart(what: str, function: Callable[..., Result], *arguments: object) -> Result:
    """Call a function of a module; `what` names the process in an error. The process ends with the call.

    Raises:
        Exception: whatever stopped it there.
        DeviceMemoryError: the operating system stopped it.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    with _interrupts_blocked():  # it inherits that: Ctrl-C reaches the whole group, and is answered here
        process.start()
    theirs.close()  # so that its end is heard
    try:
        result, failure, where = ours.recv()
    except (EOFError, ConnectionError) as error:
        raise DeviceMemoryError(
            f"the process that {what} was stopped from outside",
            expected="enough memory to load it and to draw one image",
            fix="close what else runs on this machine, or choose a smaller model",
        ) from error
    finally:
        process.kill()
        process.join()
        ours.close()
    if failure is not None:
        raise failure from RuntimeError(f"in the process that {what}:\n{where}")
    found: Result = result
    return found


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer: tuple[Any, Exception | None, str] = (function(*arguments), None, "")
    except Exception as error:  # noqa: BLE001 the caller's to answer
        answer = None, error, traceback.format_exc()
    pipe.send(answer)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
