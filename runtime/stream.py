"""A generation that its reader steps through: an iterator of events that any thread may advance and close.

`Stream` is what the reader holds. What it does lies in `StreamTurn`, which the line of the pipeline knows as well: so a
stream that its reader drops is collected at once, and says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from threading import Lock, get_ident
from typing import Any

from ..errors import InputError, PipelineBusy
from .output import ScaleEvent
from .turns import ONE_AT_A_TIME, Turn, Turns, Withdrawn, closed


class Stream(Iterator[ScaleEvent]):
    """One image, scale by scale: an iterator of `ScaleEvent`, and a context manager.

    May be advanced from any thread, and from several. The pipeline draws for it from the first event to the last; other
    calls that come meanwhile have its remaining scales drawn first, and the events wait here. It ends with its last
    event, with `close()`, or when it is dropped.

    Attributes:
        seed: what the image is drawn from.
        settings: what an output records, and the seed.
    """

    def __init__(self, turn: StreamTurn, seed: int, settings: Mapping[str, Any]) -> None:
        self._turn = turn
        self.seed, self.settings = seed, {**settings, "seed": seed}

    def __next__(self) -> ScaleEvent:
        """The next scale, drawn now if it was not drawn before.

        Raises:
            StopIteration: that was the last one, or the stream is closed.
            PipelineBusy: at the first event: the pipeline draws for somebody else, and the time to wait is over.
                Calling again waits again.
            InputError: the pipeline was closed.
            NumericsError: a scale gave numbers that are not finite.
        """
        return self._turn.next_event()

    def close(self) -> None:
        """Draw no further. Waits for the scale that is being drawn."""
        self._turn.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A word only: the collector calls this anywhere, also where locks are held. The next in line does the rest.
        with suppress(AttributeError):
            self._turn.withdrawn = True


class StreamTurn(Turn):
    """The turn of a stream. `events` draws one scale with every step; `timeout` is for the first of them.

    `_drawing` is held by the thread that steps; who holds it may take the lock of the line, never the other way.
    """

    def __init__(self, turns: Turns, events: Generator[ScaleEvent, None, None], timeout: float | None) -> None:
        super().__init__()
        self._turns, self._events, self._timeout = turns, events, timeout
        self._drawing = Lock()
        self._drawer: int | None = None  # the thread that steps
        self._ready: deque[ScaleEvent] = deque()  # drawn, not read yet
        self._failure: Exception | None = None  # met while it was moved on: for the reader, behind what is ready
        self._is_taken = self._is_over = False

    def told(self) -> str:
        return f"a stream opened {self.age} was neither finished nor closed"

    @property
    def is_mine(self) -> bool:
        return self._drawer == get_ident()

    @property
    def is_idle(self) -> bool:
        return not self._drawing.locked()

    def next_event(self) -> ScaleEvent:
        while True:
            with suppress(IndexError):
                return self._ready.popleft()
            if self.is_mine:  # a signal handler, say
                raise PipelineBusy("this thread is drawing the stream's next scale", expected=ONE_AT_A_TIME)
            try:
                with self._drawing:
                    self._draw_for_reader()
            finally:
                self._turns.wake()

    def _draw_for_reader(self) -> None:
        if self._ready:  # another thread was faster
            return
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._is_over:
            raise StopIteration
        self._drawer = get_ident()
        try:
            if not self._is_taken:
                self._take()
            self._step()
        finally:
            self._drawer = None

    def _take(self) -> None:
        try:
            self._turns.take(self, self._timeout)
        except Withdrawn:
            self._end()
            raise StopIteration from None
        self._is_taken = True

    def _step(self) -> None:
        try:
            self._ready.append(next(self._events))
        except BaseException:  # StopIteration among them
            self._end()
            raise
        if self.withdrawn:
            self._end()

    def move_on(self, end: bool) -> None:
        if not self._drawing.acquire(blocking=False):
            return
        try:
            if self._is_over or self.withdrawn:
                self._end()
            elif end:
                self._failure = closed()
                self._end()
            else:
                self._draw_for_another()
        finally:
            self._drawing.release()
            self._turns.wake()

    def _draw_for_another(self) -> None:
        """Whatever this meets is the reader's, but for what stops the thread that draws."""
        self._drawer = get_ident()
        try:
            self._step()
        except StopIteration:
            pass
        except Exception as failure:  # noqa: BLE001  raised where the reader asks for the event
            self._failure = failure
        except BaseException:
            self._failure = InputError("the stream was interrupted", fix="open it anew, with its seed")
            raise
        finally:
            self._drawer = None

    def close(self) -> None:
        self.withdrawn = True
        if self.is_mine:
            return  # ends with the step that this thread is in
        self._turns.wake()  # a reader that waits in line gives up, and with it `_drawing`
        with self._drawing:
            self._ready.clear()
            self._failure = None
            self._end()
        self._turns.wake()

    def _end(self) -> None:
        self._is_over = True
        try:
            self._events.close()
        finally:
            self._turns.release(self)
