"""The queue of a bundle: who shares a pass with whom, who is drawn when, and what becomes of those who leave."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvar import Pipeline, SamplingParams
from fastvar.errors import ImagesFailed, NumericsError
from fastvar.serving.jobs import Failed, Finished, Job, Moved, Scale
from fastvar.serving.lanes import Lane
from fastvar.serving.metrics import Metrics
from fastvar.serving.model import ServedModel
from fastvar.serving.options import ServeOptions
from fastvar.serving.wire.answers import ApiError
from tests.serving.asking import pixels

PROMPTS = ["a red circle", "a small blue square", "a green triangle", "a circle", "yellow", "a square", "blue"]
GUIDED, UNGUIDED = SamplingParams(guidance_scale=3.0), SamplingParams(guidance_scale=1.0)


class Held:
    """A pipeline whose drawing can be watched and held up."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe, self.passes, self.failing = pipe, list[list[str]](), list[Exception]()
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self._draw = pipe.draw
        pipe.draw = self.draw  # type: ignore[method-assign]  # watched

    def alone(self, prompt: str, seed: int) -> np.ndarray:
        """What the pipeline draws of it, in a pass of its own."""
        return pixels(self._draw(self.pipe.requests.generation(prompt, GUIDED, seed=seed)).images[0])

    def draw(self, requests: Any, on_scale: Any, on_image: Any) -> Any:
        self.passes.append([str(request.subject) for request in requests])
        self.entered.set()
        assert self.gate.wait(30)
        if self.failing:
            raise self.failing.pop()
        return self._draw(requests, on_scale, on_image)


Scene = Callable[[ServedModel, Held], Awaitable[None]]
SceneOfLanes = Callable[[ServedModel, list[Held]], Awaitable[None]]


@pytest.fixture
def played(batched_bundle: Path) -> Callable[..., None]:
    """Plays a scene with a model that has been loaded."""

    def play(scene: Scene, batch: int | None = None, **options: Any) -> None:
        lanes = [Lane(Pipeline.load(batched_bundle, batch=batch))]
        asyncio.run(played_on(lanes, ServeOptions(**options), lambda model, helds: scene(model, *helds)))

    return play


async def played_on(lanes: Sequence[Lane], options: ServeOptions, scene: SceneOfLanes) -> None:
    """Play a scene with a model that draws on these lanes, each of them watched."""
    loop, loaded = asyncio.get_running_loop(), asyncio.Event()
    helds = [Held(lane.pipe) for lane in lanes]
    model = ServedModel("m", lambda: lanes, options, Metrics())
    model.start(lambda: loop.call_soon_threadsafe(loaded.set))
    await loaded.wait()
    try:
        await asyncio.wait_for(scene(model, helds), 60)
    finally:
        for held in helds:
            held.gate.set()
        await model.stop()
    assert all(lane.pipe.closed for lane in lanes)


def job(held: Held, *prompts: str, params: SamplingParams = GUIDED, seed: int = 1, **more: Any) -> Job:
    return Job(held.pipe.requests.generation(list(prompts), params, seed=seed), **more)


async def told(job: Job, kind: type, count: int = 1) -> list[Any]:
    """The next so many news of that kind."""
    found: list[Any] = []
    while len(found) < count:
        news = await job.news.get()
        assert isinstance(news, kind) or not isinstance(news, Failed), news
        found += [news] if isinstance(news, kind) else []
    return found


async def busy(model: ServedModel, held: Held) -> Job:
    """A job that is being drawn until the gate opens."""
    held.gate.clear()
    held.entered.clear()
    first = job(held, "yellow")
    model.submit(first)
    await asyncio.to_thread(held.entered.wait, 30)
    return first


def test_requests_that_wait_share_passes_in_order_of_arrival(played):
    async def scene(model: ServedModel, held: Held) -> None:
        await busy(model, held)
        jobs = [job(held, prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
        for one in jobs:
            model.submit(one)
        held.gate.set()
        images = [(await told(one, Finished))[0].image for one in jobs]
        assert held.passes == [["yellow"], PROMPTS[:4], PROMPTS[4:6], PROMPTS[6:]]
        for seed, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
            assert (image.prompt, image.seed) == (prompt, seed)
            assert np.array_equal(pixels(image.image), held.alone(prompt, seed)), "joined is as alone"

    played(scene)


def test_settings_differ_freely_and_guidance_parts(played):
    """Who is first is never passed over: those without guidance have their own pass as soon as they are first."""

    async def scene(model: ServedModel, held: Held) -> None:
        await busy(model, held)
        mixed = [
            job(held, "a circle", params=SamplingParams(guidance_scale=2.0, tau=0.7)),
            job(held, "blue", params=UNGUIDED),
            job(held, "a square", params=SamplingParams(guidance_scale=4.0, top_p=0.5, negative_prompt="red")),
            job(held, "a red circle", params=UNGUIDED),
        ]
        for one in mixed:
            model.submit(one)
        held.gate.set()
        for one in mixed:
            await told(one, Finished)
        assert held.passes[1:] == [["a circle", "a square"], ["blue", "a red circle"]]

    played(scene)


def test_images_of_one_request_fill_passes_too(played):
    async def scene(model: ServedModel, held: Held) -> None:
        await busy(model, held)
        long, short = job(held, *PROMPTS), job(held, "a red circle")
        model.submit(long)
        model.submit(short)
        held.gate.set()
        finished = await told(long, Finished, 7)
        await told(short, Finished)
        assert sorted(news.place for news in finished) == list(range(7))
        assert held.passes[1:] == [PROMPTS[:4], [*PROMPTS[4:], "a red circle"]]

    played(scene)


def test_the_first_waits_a_little_for_others(played):
    async def scene(model: ServedModel, held: Held) -> None:
        one, other = job(held, "a circle"), job(held, "blue")
        model.submit(one)
        await asyncio.sleep(0.05)
        model.submit(other)
        await told(one, Finished)
        await told(other, Finished)
        assert held.passes == [["a circle", "blue"]]

    played(scene, batch_wait_ms=1500)


def test_where_passes_hold_one_image_nobody_waits_for_others(played):
    async def scene(model: ServedModel, held: Held) -> None:
        one = job(held, "a circle")
        model.submit(one)
        await told(one, Finished)
        assert one.queue_ms < 2000

    played(scene, batch=1, batch_wait_ms=10_000)


def test_places_in_the_queue_are_told(played):
    async def scene(model: ServedModel, held: Held) -> None:
        await busy(model, held)
        jobs = [job(held, prompt) for prompt in PROMPTS[:3]]
        for one in jobs:
            model.submit(one)
        places = [(await told(one, Moved))[0].ahead for one in jobs]
        assert places == [1, 2, 3]
        assert model.cancel(jobs[0]) == "queued"
        assert [(await told(one, Moved))[0].ahead for one in jobs[1:]] == [1, 2]
        held.gate.set()
        assert (await told(jobs[2], Moved))[0].ahead == 1, "the pass before"

    played(scene, batch=1)


def test_a_full_queue_says_when_to_come_again(played):
    async def scene(model: ServedModel, held: Held) -> None:
        await busy(model, held)
        for prompt in PROMPTS[:2]:
            model.submit(job(held, prompt))
        for refusing in (lambda: model.submit(job(held, "blue")), model.check_room):
            with pytest.raises(ApiError) as caught:
                refusing()
            assert (caught.value.status, caught.value.code) == (429, "queue_full")
            assert 1 <= int(caught.value.headers["retry-after"]) <= 120
        held.gate.set()

    played(scene, queue=2)


def test_who_leaves_the_queue_is_not_drawn_and_makes_room(played):
    async def scene(model: ServedModel, held: Held) -> None:
        await busy(model, held)
        gone, stays = job(held, "a circle"), job(held, "blue")
        model.submit(gone)
        assert model.cancel(gone) == "queued"
        assert model.cancel(gone) == ""
        model.submit(stays)
        held.gate.set()
        await told(stays, Finished)
        assert held.passes == [["yellow"], ["blue"]]

    played(scene, queue=1)


def test_who_leaves_while_being_drawn_ends_the_pass_at_the_next_scale(played):
    async def scene(model: ServedModel, held: Held) -> None:
        scales, tell = list[int](), model._tell_scale

        def telling(units: Any, event: Any) -> None:
            scales.append(event.index)
            if len(scales) == 2:
                assert model.cancel(first) == "drawing"
            tell(units, event)

        model._tell_scale = telling  # type: ignore[method-assign]  # watched
        first = await busy(model, held)
        held.gate.set()
        after = job(held, "blue", seed=4)
        model.submit(after)
        (drawn,) = await told(after, Finished)
        assert len(scales) == 2 + len(held.pipe.manifest.plan.steps)
        assert np.array_equal(pixels(drawn.image.image), held.alone("blue", 4))

    played(scene)


def test_a_pass_goes_on_for_those_who_stay(played):
    async def scene(model: ServedModel, held: Held) -> None:
        await busy(model, held)
        gone, stays = job(held, "a circle"), job(held, "blue", seed=4)
        model.submit(gone)
        model.submit(stays)
        held.entered.clear()
        held.gate.set()
        await asyncio.to_thread(held.entered.wait, 30)
        model.cancel(gone)
        (drawn,) = await told(stays, Finished)
        assert np.array_equal(pixels(drawn.image.image), held.alone("blue", 4))

    played(scene)


def test_watched_scales_are_told_and_can_be_drawn_later(played):
    async def scene(model: ServedModel, held: Held) -> None:
        steps = [step.index for step in held.pipe.manifest.plan.steps]
        watching = job(held, "a circle", watched=frozenset(steps[:2]))
        model.submit(watching)
        news = await told(watching, Scale, 2)
        await told(watching, Finished)
        own = list(held.pipe.stream("a circle", guidance_scale=3.0, seed=1))
        for told_scale, event in zip(news, own, strict=False):
            assert np.array_equal(pixels(told_scale.event.preview()), pixels(event.preview()))

    played(scene)


def test_previews_are_encoded_by_the_thread_that_draws_where_it_draws_on_cores(played):
    async def scene(model: ServedModel, held: Held) -> None:
        first, second = (step.index for step in held.pipe.manifest.plan.steps[:2])

        def encoded(event: Any) -> str:
            if event.index == second:
                raise OSError("no room")
            return f"{threading.current_thread().name} {event.index}"

        watching = job(held, "a circle", watched=frozenset({first, second}), encode_preview=encoded)
        model.submit(watching)
        news = await told(watching, Scale, 2)
        await told(watching, Finished)
        assert [one.encoded for one in news] == [f"draws m {first}", None], "what fails ends no pass"

    played(scene)


@pytest.mark.parametrize("which", ["one of two", "both"])
def test_what_fails_fails_alone(played, which: str):
    async def scene(model: ServedModel, held: Held) -> None:
        await busy(model, held)
        bad, good = job(held, "a circle"), job(held, "blue")
        model.submit(bad)
        model.submit(good)
        wrong = NumericsError("NaN")
        draw = held._draw

        def failing(requests: Any, on_scale: Any, on_image: Any) -> Any:
            output = draw(requests[1:], on_scale, lambda image: on_image(_moved(image)))
            raise ImagesFailed({0: wrong}, 2, output)

        if which == "one of two":
            held._draw = lambda *a: failing(*a) if len(a[0]) == 2 else draw(*a)  # type: ignore[method-assign]  # fails
        else:
            held._draw = lambda *a: (_ for _ in ()).throw(wrong) if len(a[0]) == 2 else draw(*a)  # type: ignore[method-assign]  # fails
        held.gate.set()
        while not isinstance(news := await bad.news.get(), Failed):
            pass
        assert news.error is wrong
        if which == "one of two":
            await told(good, Finished)
        else:
            while not isinstance(news := await good.news.get(), Failed):
                pass
        after = job(held, "blue")
        model.submit(after)
        await told(after, Finished)

    played(scene)


def _moved(image: Any) -> Any:
    from dataclasses import replace

    return replace(image, index=image.index + 1)


def test_who_waits_is_told_that_the_server_ends_and_who_is_drawn_is_finished(played):
    async def scene(model: ServedModel, held: Held) -> None:
        first = await busy(model, held)
        waiting = job(held, "blue")
        model.submit(waiting)
        model.refuse_waiting()
        while not isinstance(news := await waiting.news.get(), Failed):
            pass
        assert (news.error.status, news.error.code) == (503, "shutting_down")  # type: ignore[attr-defined]  # an ApiError
        with pytest.raises(ApiError, match="shutting down"):
            model.submit(job(held, "blue"))
        assert not await model.idle(0.05)
        held.gate.set()
        await told(first, Finished)
        assert await model.idle(30)

    played(scene)


def test_what_takes_too_long_at_the_end_is_told_so(played):
    async def scene(model: ServedModel, held: Held) -> None:
        first = await busy(model, held)
        model.refuse_waiting()
        model.abandon()
        while not isinstance(news := await first.news.get(), Failed):
            pass
        assert news.error.code == "shutting_down"  # type: ignore[attr-defined]  # an ApiError
        held.gate.set()
        assert await model.idle(30)

    played(scene)


def test_a_bundle_that_cannot_be_loaded_says_why():
    async def scene() -> None:
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def load() -> list[Lane]:
            raise NumericsError("damaged")

        model = ServedModel("m", load, ServeOptions(), Metrics())
        with pytest.raises(ApiError, match="being loaded"):
            model.check_room()
        model.start(lambda: loop.call_soon_threadsafe(done.set))
        await done.wait()
        assert isinstance(model.failure, NumericsError)

    run: Coroutine[Any, Any, None] = scene()
    asyncio.run(run)
