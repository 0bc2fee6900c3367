"""Whose turn it is. A pipeline's memory holds one image: whoever draws into it holds the turn, the others wait in line.

A call holds the turn in its thread until its image is drawn. A stream belongs to no thread, and would hold the turn
between its events for as long as its reader likes. Whoever is first in line therefore moves it on: draws its next
scale and leaves the event for the reader, again and again until the stream is done. A stream that nobody reads, or
that was dropped, keeps nobody waiting.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from threading import Condition, Lock, get_ident

from ..errors import InputError, PipelineBusy

# Longest wait for a callback of another call that does not return: it may itself wait for this pipeline.
CALLBACK_PATIENCE = 600.0  # seconds
POLL = 1.0  # seconds: a stream may be dropped without a word, and Windows hears Ctrl-C only between waits
ONE_AT_A_TIME = "one image at a time: memory is static"


class Turn(ABC):
    """A claim to the memory. Knows who makes it, in words, and what can be done about it."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.withdrawn = False  # whoever wanted it no longer does

    @property
    def age(self) -> str:
        return f"{time.monotonic() - self.began:.0f} s ago"

    @abstractmethod
    def told(self) -> str:
        """Who holds the turn, as the end of a sentence."""

    @property
    @abstractmethod
    def is_mine(self) -> bool:
        """Whether this thread is the one that draws with it: to wait for it would be to wait for itself."""

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """Whether nobody draws with it at the moment, so that `move_on` would."""

    @property
    def is_stuck(self) -> bool:
        """Whether it has not come back from the caller's own code for longer than anybody should wait."""
        return False

    @abstractmethod
    def move_on(self, end: bool) -> None:
        """Draw what comes next for its owner, or `end` it. Called without any lock, by the first in line."""


class CallTurn(Turn):
    """One image of a call, drawn in one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = get_ident()
        self._in_callback_since = inf

    @contextmanager
    def in_callback(self) -> Iterator[None]:
        """While the caller's own code runs."""
        self._in_callback_since = time.monotonic()
        try:
            yield
        finally:
            self._in_callback_since = inf

    @property
    def _callback_seconds(self) -> float:
        return time.monotonic() - self._in_callback_since

    def told(self) -> str:
        listener = f", its callback running for {self._callback_seconds:.0f} s" if self._callback_seconds >= 0 else ""
        return f"a call draws an image that it began {self.age}{listener}"

    @property
    def is_mine(self) -> bool:
        return self._thread == get_ident()

    @property
    def is_idle(self) -> bool:
        return False

    @property
    def is_stuck(self) -> bool:
        return self._callback_seconds > CALLBACK_PATIENCE

    def move_on(self, end: bool) -> None:
        pass


class Withdrawn(Exception):  # noqa: N818  the end of a wait, not an error
    """The turn that was waited for is no longer wanted."""


class Turns:
    """The line of a pipeline, first come first served.

    `timeout`: seconds to wait by default; None for as long as those ahead get on.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        # No RLock: the garbage collector may run this module's code in a thread that is inside it.
        self._changed = Condition(Lock())
        self._line: deque[Turn] = deque()
        self._holder: Turn | None = None
        self.closed = False

    @contextmanager
    def taken(self, turn: Turn, timeout: float | None = None) -> Iterator[None]:
        """Hold the turn, once it comes.

        Raises:
            PipelineBusy, InputError: as `take`.
        """
        try:
            self.take(turn, timeout)
            yield
        finally:
            self.release(turn)

    def take(self, turn: Turn, timeout: float | None = None, *, last: bool = False) -> None:
        """Wait in line, and move on what is idle there. `last`: streams are ended, not drawn to their end.

        Raises:
            PipelineBusy: the time is over, this thread waits for itself, or a callback ahead does not return.
            InputError: the pipeline was closed.
            Withdrawn: the turn is no longer wanted.
        """
        timeout = self._timeout if timeout is None else timeout
        deadline = inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._line.append(turn)
        try:
            while (ahead := self._wait(turn, deadline)) is not turn:
                ahead.move_on(end=last)
        finally:
            with self._changed:
                self._line.remove(turn)
                self._changed.notify_all()

    def _wait(self, turn: Turn, deadline: float) -> Turn:
        """Until the turn is `turn`'s, or its holder is idle and `turn` first in line; gives the one that holds it."""
        with self._changed:
            while True:
                if self.closed:
                    raise closed()
                if turn.withdrawn:
                    raise Withdrawn
                is_first, holder = self._line[0] is turn, self._holder
                if is_first and holder in (None, turn):
                    self._holder = turn
                    return turn
                left = deadline - time.monotonic()
                if holder is not None:
                    if is_first and holder.is_idle and (left > 0 or holder.withdrawn):
                        return holder
                    _refuse_waiting_for(holder, left)
                elif left <= 0:
                    raise _busy("others wait in line", "wait longer (timeout=, busy_timeout=)")
                self._changed.wait(min(POLL, left))

    def release(self, turn: Turn) -> None:
        """Let the next one draw; nothing where another holds the turn."""
        with self._changed:
            if self._holder is turn:
                self._holder = None
                self._changed.notify_all()

    def wake(self) -> None:
        """Have those who wait look again: a turn became idle, or is no longer wanted."""
        with self._changed:
            self._changed.notify_all()

    def close(self, free: Callable[[], None], timeout: float | None = None) -> None:
        """Take the turn, after which there is no other, and call `free`; at once where that was done before.

        Raises:
            PipelineBusy: as `take`.
        """
        turn = CallTurn()
        try:
            if not self.closed:
                self.take(turn, timeout, last=True)
                self.closed = True
                free()
        except InputError:
            if not self.closed:  # else another thread closed it meanwhile
                raise
        finally:
            self.release(turn)


def closed() -> InputError:
    """What every use of a closed pipeline meets."""
    return InputError("the pipeline is closed", expected="an open one", fix="load it again: Pipeline.load(path)")


def _refuse_waiting_for(holder: Turn, left: float) -> None:
    if holder.is_mine:
        raise _busy(
            f"{holder.told()}, and this thread is inside it: it would wait for itself",
            "draw when the callback has returned (callback_on_image_end may draw), or load a second pipeline",
        )
    if left <= 0:
        raise _busy(holder.told(), "finish or close the stream, wait longer (timeout=), or load a second pipeline")
    if holder.is_stuck:
        raise _busy(holder.told(), "let the callback return: it must not wait for this pipeline in another thread")


def _busy(who: str, fix: str) -> PipelineBusy:
    return PipelineBusy(f"the pipeline is busy: {who}", expected=ONE_AT_A_TIME, fix=fix)
