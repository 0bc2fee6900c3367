"""Who draws when, without anything that draws: calls in line, streams that are moved on, and how waiting ends."""

from __future__ import annotations

import _thread
import gc
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from fastvar.errors import FastvarError, InputError, NumericsError, PipelineBusy
from fastvar.runtime import turns as module
from fastvar.runtime.stream import Stream, StreamTurn
from fastvar.runtime.turns import CallTurn, Turns, Withdrawn


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as found:
        yield found


def stream(turns: Turns, events: Generator[Any, None, None] | None = None, timeout: float | None = None) -> Stream:
    return Stream(StreamTurn(turns, counting() if events is None else events, timeout), 7, {})


def counting(count: int = 3, seen: list[Any] | None = None) -> Generator[Any, None, None]:
    """Events 0, 1, 2; tells when it ended."""
    try:
        yield from range(count)
    finally:
        if seen is not None:
            seen.append("ended")


def take(turns: Turns, timeout: float | None = None) -> None:
    with turns.taken(CallTurn(), timeout):
        pass


@contextmanager
def held(turns: Turns, pool: ThreadPoolExecutor, *, in_callback: bool = False) -> Iterator[Callable[[], None]]:
    """Another thread holds the turn; gives what lets it go."""
    begun, over = threading.Event(), threading.Event()

    def hold() -> None:
        turn = CallTurn()
        with turns.taken(turn):
            begun.set()
            if in_callback:
                with turn.in_callback():
                    over.wait(20)
            else:
                over.wait(20)

    done = pool.submit(hold)
    assert begun.wait(5)
    try:
        yield over.set
    finally:
        over.set()
        done.result(5)


def waits(turns: Turns, count: int) -> None:
    """Until so many are in line."""
    end = time.monotonic() + 5
    while len(turns._line) < count:
        assert time.monotonic() < end
        time.sleep(0.001)


# Calls in line


def test_first_come_first_served(turns: Turns, pool: ThreadPoolExecutor):
    order: list[int] = []

    def draw(number: int) -> None:
        with turns.taken(CallTurn()):
            order.append(number)

    with held(turns, pool) as let_go:
        jobs = []
        for number in range(5):
            jobs.append(pool.submit(draw, number))
            waits(turns, number + 1)
        let_go()
        for job in jobs:
            job.result(5)
    assert order == list(range(5))


def test_a_wait_that_is_over_says_who_draws(pool: ThreadPoolExecutor):
    turns = Turns(timeout=0.05)
    with held(turns, pool):
        with pytest.raises(PipelineBusy, match=r"a call draws an image that it began \d+ s ago") as error:
            take(turns)
        assert "timeout=" in error.value.fix
        with pytest.raises(PipelineBusy):
            take(turns, timeout=0)
    take(turns, timeout=0)
    assert isinstance(error.value, FastvarError)


def test_the_callers_own_time_counts(pool: ThreadPoolExecutor):
    turns = Turns(timeout=0)
    with held(turns, pool) as let_go:
        job = pool.submit(take, turns, 20.0)
        waits(turns, 1)
        let_go()
        job.result(5)


def test_a_thread_does_not_wait_for_itself(turns: Turns):
    with turns.taken(CallTurn()), pytest.raises(PipelineBusy, match="this thread is inside it") as error:
        take(turns)
    assert "callback" in error.value.fix
    take(turns, timeout=0)


def test_a_callback_that_waits_for_its_own_pipeline_in_another_thread(
    turns: Turns, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "CALLBACK_PATIENCE", 0.05)
    monkeypatch.setattr(module, "POLL", 0.01)
    with held(turns, pool, in_callback=True), pytest.raises(PipelineBusy, match="its callback running for") as error:
        take(turns)
    assert "let the callback return" in error.value.fix
    with held(turns, pool):  # one that draws may take as long as it likes
        job = pool.submit(take, turns)
        time.sleep(0.2)
        assert not job.done()


def test_an_interrupted_wait_leaves_the_line(turns: Turns, pool: ThreadPoolExecutor):
    with held(turns, pool):
        turn = CallTurn()
        job = pool.submit(turns.take, turn)
        waits(turns, 1)
        turn.withdrawn = True
        turns.wake()
        assert isinstance(job.exception(5), Withdrawn)
        assert not turns._line
    take(turns, timeout=0)


def test_ctrl_c_ends_a_wait(turns: Turns, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "POLL", 0.05)

    def interrupt() -> None:
        waits(turns, 1)
        _thread.interrupt_main()

    with held(turns, pool):
        pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            take(turns)
        assert not turns._line
    take(turns, timeout=0)


# Closing


def test_closing_waits_for_those_in_line_and_refuses_the_rest(turns: Turns, pool: ThreadPoolExecutor):
    freed: list[str] = []
    with held(turns, pool) as let_go:
        earlier = pool.submit(take, turns)
        waits(turns, 1)
        closers = [pool.submit(turns.close, lambda: freed.append("freed"))]
        waits(turns, 2)
        closers.append(pool.submit(turns.close, lambda: freed.append("freed again")))
        later = pool.submit(take, turns)
        waits(turns, 4)
        let_go()
        assert earlier.exception(5) is None
        assert [closer.exception(5) for closer in closers] == [None, None]
        assert isinstance(later.exception(5), InputError)
    assert freed == ["freed"]
    turns.close(lambda: freed.append("freed again"))
    assert freed == ["freed"]
    with pytest.raises(InputError, match="the pipeline is closed"):
        take(turns)


def test_closing_takes_no_longer_than_it_is_told(turns: Turns, pool: ThreadPoolExecutor):
    with held(turns, pool), pytest.raises(PipelineBusy):
        turns.close(lambda: None, timeout=0)
    take(turns)


def test_closing_ends_a_stream_with_an_error_behind_what_was_drawn(turns: Turns, pool: ThreadPoolExecutor):
    seen: list[str] = []
    opened = stream(turns, counting(seen=seen))
    assert next(opened) == 0
    turns.close(lambda: seen.append("freed"))
    assert seen == ["ended", "freed"]
    with pytest.raises(InputError, match="the pipeline is closed"):
        next(opened)
    assert list(opened) == []


# Streams


def test_whoever_waits_has_the_rest_of_a_stream_drawn_first(turns: Turns):
    drawn: list[Any] = []

    def events() -> Generator[Any, None, None]:
        for i in range(3):
            drawn.append(i)
            yield i

    opened = stream(turns, events())
    assert next(opened) == 0
    assert drawn == [0]
    with turns.taken(CallTurn()):
        assert drawn == [0, 1, 2]
        assert list(opened) == [1, 2], "they can be read while another draws"


def test_a_stream_that_nobody_reads_keeps_nobody_waiting(turns: Turns, pool: ThreadPoolExecutor):
    opened = pool.submit(lambda: (found := stream(turns), next(found))[0]).result(5)
    for job in [pool.submit(take, turns) for _ in range(20)]:
        job.result(5)
    assert list(opened) == [1, 2]


def test_streams_in_one_thread_take_turns(turns: Turns):
    first, second = stream(turns), stream(turns)
    assert [next(first), next(second), next(first), next(second)] == [0, 0, 1, 1]
    assert (list(first), list(second)) == ([2], [2])


def test_a_dropped_stream_is_ended_not_drawn(turns: Turns):
    seen: list[Any] = []
    opened = stream(turns, counting(seen=seen))
    next(opened)
    del opened
    gc.collect()
    take(turns, timeout=0)
    assert seen == ["ended"]


def test_a_closed_stream_gives_the_turn_back(turns: Turns):
    seen: list[Any] = []
    with stream(turns, counting(seen=seen)) as opened:
        next(opened)
        with pytest.raises(PipelineBusy, match=r"a stream opened \d+ s ago was neither finished nor closed") as error:
            take(turns, timeout=0)
    assert "close the stream" in error.value.fix
    assert seen == ["ended"]
    take(turns, timeout=0)
    assert list(opened) == []
    opened.close()


def test_several_threads_read_every_event_once(turns: Turns, pool: ThreadPoolExecutor):
    opened = stream(turns, counting(500))
    found = [pool.submit(list, opened) for _ in range(4)]
    others = [pool.submit(take, turns) for _ in range(4)]
    assert sorted(i for job in found for i in job.result(20)) == list(range(500))
    for job in others:
        job.result(5)


def test_an_error_met_for_another_is_the_readers(turns: Turns):
    def events() -> Generator[Any, None, None]:
        yield 0
        yield 1
        raise NumericsError("scale 2: not finite")

    opened = stream(turns, events())
    assert next(opened) == 0
    take(turns)
    assert next(opened) == 1
    with pytest.raises(NumericsError, match="scale 2"):
        next(opened)
    assert list(opened) == []


def test_an_error_of_the_reader_ends_the_stream(turns: Turns):
    def events() -> Generator[Any, None, None]:
        yield 0
        raise NumericsError("scale 1: not finite")

    opened = stream(turns, events())
    next(opened)
    with pytest.raises(NumericsError):
        next(opened)
    take(turns, timeout=0)


def test_who_is_interrupted_while_drawing_for_another_stops_and_the_reader_is_told(turns: Turns):
    def events() -> Generator[Any, None, None]:
        yield 0
        raise KeyboardInterrupt

    opened = stream(turns, events())
    next(opened)
    with pytest.raises(KeyboardInterrupt):
        take(turns)
    with pytest.raises(InputError, match="the stream was interrupted"):
        next(opened)
    take(turns, timeout=0)


def test_a_stream_that_came_too_late_may_be_asked_again(turns: Turns, pool: ThreadPoolExecutor):
    opened = stream(turns, timeout=0)
    with held(turns, pool), pytest.raises(PipelineBusy):
        next(opened)
    assert list(opened) == [0, 1, 2]


def test_a_stream_closed_while_its_reader_waits_in_line(turns: Turns, pool: ThreadPoolExecutor):
    opened = stream(turns)
    with held(turns, pool):
        reader = pool.submit(list, opened)
        waits(turns, 1)
        opened.close()
        assert reader.result(5) == []


def test_closing_waits_for_the_scale_that_is_drawn(turns: Turns, pool: ThreadPoolExecutor):
    begun, go_on, seen = threading.Event(), threading.Event(), []

    def events() -> Generator[Any, None, None]:
        try:
            begun.set()
            go_on.wait(20)
            yield 0
        finally:
            seen.append("ended")

    opened = stream(turns, events())
    reader = pool.submit(next, opened, None)
    assert begun.wait(5)
    closer = pool.submit(opened.close)
    time.sleep(0.05)
    assert not closer.done()
    go_on.set()
    closer.result(5)
    assert seen == ["ended"]
    reader.result(5)
    take(turns, timeout=0)


def test_a_stream_asked_from_inside_its_own_step(turns: Turns):
    """A signal handler may do so: there is no lock that this thread could wait for."""
    found: list[Any] = []

    def events() -> Generator[Any, None, None]:
        with pytest.raises(PipelineBusy, match="this thread is drawing"):
            next(opened)
        with pytest.raises(PipelineBusy, match="this thread is inside it"):
            take(turns)
        opened.close()
        found.append("closed")
        yield 0
        yield 1

    opened = stream(turns, events())
    assert [*opened] == [0], "what was being drawn still comes, and nothing else"
    assert found == ["closed"]
    take(turns, timeout=0)
