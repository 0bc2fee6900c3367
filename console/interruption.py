"""Signals that end a command: Ctrl-C, SIGTERM of `docker stop` and `timeout`, SIGHUP of a closed terminal.

Each becomes an exception, so that whatever is open is cleaned up on its way.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What ends a command, and the line that says so. Windows has no SIGHUP.
ENDINGS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}
# Within these a second signal is the first one: `timeout` sends SIGTERM to a process and once more to its group.
SAME_REQUEST_SECONDS = 1.0


class Interrupted(BaseException):
    """A signal asked the command to end.

    Neither an Exception nor a KeyboardInterrupt: nothing on its way takes it for its own.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(ENDINGS[signal.Signals(number).name])

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it."""
        return 128 + self.number


class _Answer:
    """The handler: the first signal is handed on, a second one ends the process as it is."""

    def __init__(self) -> None:
        self.first = 0  # the signal's number
        self._when = 0.0

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.first:
            self.first, self._when = number, now
            self.answer()
        elif now - self._when >= SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            os._exit(128 + number)  # where the default is to go on

    def answer(self) -> None:
        raise Interrupted(self.first)


class _LaterAnswer(_Answer):
    def answer(self) -> None:
        pass


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Signals that end a command raise `Interrupted` in the block; a second one, a second later, ends it at once.

    Those that the parent process had ignored, as `nohup` does, stay ignored. Threads other than the main one cannot
    be told of signals: there nothing is changed.
    """
    with _answered(_Answer()):
        yield


@contextmanager
def signals_deferred() -> Iterator[None]:
    """A signal that arrives in the block is answered when the block is done."""
    later = _LaterAnswer()
    with _answered(later):
        yield
    if later.first:
        signal.raise_signal(later.first)


@contextmanager
def _answered(answer: _Answer) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.Signals[name] for name in ENDINGS if hasattr(signal, name)]
    # SIG_IGN is the parent's wish; None is a handler that Python knows nothing of.
    heard = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, answer) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
