"""Callbacks, previews and streams, and who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL.Image import Image

from fastvar import Pipeline
from fastvar.errors import PipelineBusy
from fastvar.runtime.output import ScaleEvent
from fastvar.runtime.preview import Preview
from tests.runtime.pipeline.drawing import PROMPT, SCALES, StoppedError, in_threads, pixels, previews


def test_callback_comes_once_per_executed_scale(pipe: Pipeline, image: Image):
    events: list[ScaleEvent] = []
    out = pipe(PROMPT, seed=7, callback_on_scale_end=events.append)
    assert [(e.index, e.size, e.tokens, e.kept) for e in events] == SCALES
    assert [e.ms for e in events] == [s.ms for s in out.timings[0].scales]
    assert pixels(out.images[0]) == pixels(image)


def test_callback_comes_for_every_image(pipe: Pipeline):
    indices: list[int] = []
    pipe(PROMPT, num_images=2, callback_on_scale_end=lambda event: indices.append(event.index))
    assert indices == [0, 2, 6] * 2


def test_callback_that_raises_leaves_the_pipeline_usable(pipe: Pipeline, image: Image):
    def stop(event: ScaleEvent) -> None:
        if event.index == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        pipe(PROMPT, callback_on_scale_end=stop)
    assert pixels(pipe(PROMPT, seed=7).images[0]) == pixels(image)


def test_callback_may_not_draw_with_its_own_pipeline(pipe: Pipeline):
    for draw in (lambda _: pipe(PROMPT), lambda _: next(pipe.stream(PROMPT)), lambda _: pipe.close()):
        with pytest.raises(PipelineBusy, match="this thread is inside it"):
            pipe(PROMPT, callback_on_scale_end=draw)


def test_callback_between_images_may_draw(pipe: Pipeline, image: Image):
    inner: list[bytes] = []
    out = pipe(PROMPT, seed=6, num_images=2, callback_on_image_end=lambda _: inner.extend(previews(pipe, seed=8)))
    assert pixels(out.images[1]) == pixels(image)
    assert inner == previews(pipe, seed=8) * 2


def test_previews_are_images_that_get_nearer(pipe: Pipeline):
    found = [event.preview() for event in pipe.stream(PROMPT, seed=7)]
    assert [(type(image).__name__, image.mode, image.size) for image in found] == [("Image", "RGB", (256, 256))] * 3
    assert len({pixels(image) for image in found}) == 3
    assert [len(image.getcolors(256 * 256)) > 1 for image in found] == [False, True, True], "one colour at 1x1"


def test_previews_stay_those_of_their_scale(pipe: Pipeline):
    own = previews(pipe, seed=7)
    events = list(pipe.stream(PROMPT, seed=7))
    kept: list[ScaleEvent] = []
    pipe(PROMPT, seed=7, callback_on_scale_end=kept.append)
    stream = pipe.stream(PROMPT, seed=7)
    left = [next(stream), next(stream)]
    del stream
    pipe("a green triangle", seed=1)
    for late in (events, kept, left):
        assert [event.preview().tobytes() for event in late] == own[: len(late)]


def test_codes_are_copied_for_those_who_can_still_ask(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
    kept: list[Preview] = []
    keep = Preview.keep
    monkeypatch.setattr(Preview, "keep", lambda preview: (kept.append(preview), keep(preview)))
    pipe(PROMPT, callback_on_scale_end=lambda _: None)
    assert not kept, "the listener let every event go"
    pipe(PROMPT)
    assert not kept, "nobody listens"
    events: list[ScaleEvent] = []
    pipe(PROMPT, callback_on_scale_end=events.append)
    assert kept == [event.preview for event in events]


def test_drawing_between_the_events_of_a_stream(pipe: Pipeline, image: Image):
    """The stream is drawn to its end first, and its events wait."""
    undisturbed = previews(pipe, seed=8)
    stream = pipe.stream(PROMPT, seed=8)
    found = [next(stream).preview().tobytes()]
    assert pixels(pipe(PROMPT, seed=7).images[0]) == pixels(image)
    found += [event.preview().tobytes() for event in stream]
    assert found == undisturbed


def test_two_streams_step_by_step(pipe: Pipeline):
    pair = zip(pipe.stream(PROMPT, seed=7), pipe.stream(PROMPT, seed=8, guidance_scale=1), strict=True)
    found = [(a.preview().tobytes(), b.preview().tobytes()) for a, b in pair]
    assert [list(one) for one in zip(*found, strict=True)] == [
        previews(pipe, seed=7),
        previews(pipe, seed=8, guidance_scale=1),
    ]


def test_abandoned_streams_keep_nobody_waiting(pipe: Pipeline, image: Image):
    """Dropped, forgotten with its thread, or just not read on."""
    next(pipe.stream(PROMPT, seed=1))
    forgotten: list[Iterator[ScaleEvent]] = []

    def open_and_leave() -> None:
        forgotten.append(pipe.stream(PROMPT, seed=2))
        next(forgotten[0])

    in_threads([open_and_leave])
    assert pixels(pipe(PROMPT, seed=7, timeout=60).images[0]) == pixels(image)


def test_a_pool_smaller_than_its_requests(pipe: Pipeline):
    """All threads of the pool wait for a stream that only a thread of the pool could read on."""
    with ThreadPoolExecutor(2) as pool:
        stream = pipe.stream(PROMPT, seed=7)
        found = [pool.submit(next, stream).result()]
        others = [pool.submit(pipe, PROMPT, seed=seed) for seed in range(3)]
        while (event := pool.submit(next, stream, None).result(60)) is not None:
            found.append(event)
        images = [pixels(other.result(60).images[0]) for other in others]
    assert [event.preview().tobytes() for event in found] == previews(pipe, seed=7)
    assert images == [pixels(pipe(PROMPT, seed=seed).images[0]) for seed in range(3)]


def test_another_thread_waits_while_a_scale_is_drawn(pipe: Pipeline):
    """The time to wait counts; without one, it waits."""
    begun, go_on = threading.Event(), threading.Event()

    def hold(event: ScaleEvent) -> None:
        begun.set()
        go_on.wait(60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pipe, PROMPT, seed=7, callback_on_scale_end=hold)
        assert begun.wait(60)
        with pytest.raises(PipelineBusy, match="a call draws an image that it began"):
            pipe(PROMPT, timeout=0.05)
        with pytest.raises(PipelineBusy):
            next(pipe.stream(PROMPT, timeout=0))
        second = pool.submit(previews, pipe, seed=8)
        go_on.set()
        assert first.result(60).seeds == [7]
        assert second.result(60) == previews(pipe, seed=8)


def test_pipelines_own_time_to_wait(tiny_bundle: Path):
    impatient = Pipeline.load(tiny_bundle, busy_timeout=0)
    stream = impatient.stream(PROMPT)
    next(stream)
    with pytest.raises(PipelineBusy, match=r"a stream opened \d+ s ago"):
        impatient(PROMPT)
    impatient(PROMPT, timeout=60)
    left: list[Iterator[ScaleEvent]] = []

    def leave_a_stream(_: object) -> None:
        left.append(impatient.stream(PROMPT, timeout=60))
        next(left[-1])

    assert len(impatient(PROMPT, num_images=3, callback_on_image_end=leave_a_stream).images) == 3, "begun is finished"
