"""Pipelines side by side: who draws when, whether images are those of a pipeline alone, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend
from fastvar.errors import DeviceMemoryError, InputError
from fastvar.serving import lanes as module
from fastvar.serving.jobs import Failed, Finished
from fastvar.serving.lanes import Lane, open_lanes
from fastvar.serving.model import ServedModel
from fastvar.serving.options import ServeOptions
from tests.serving.asking import pixels
from tests.serving.test_model import PROMPTS, Held, SceneOfLanes, job, played_on, told


@pytest.fixture
def played(batched_bundle: Path) -> Callable[[SceneOfLanes], None]:
    """Plays a scene with a model of three lanes: the whole, and two that are narrow."""

    def play(scene: SceneOfLanes) -> None:
        pipes = [Pipeline.load(batched_bundle, threads=threads) for threads in (2, 1, 1)]
        lanes = [Lane(pipe, is_whole=place == 0) for place, pipe in enumerate(pipes)]
        asyncio.run(played_on(lanes, ServeOptions(), scene))

    return play


async def _entered(held: Held) -> None:
    assert await asyncio.to_thread(held.entered.wait, 30)


def test_a_single_pass_is_drawn_on_all_cores(played):
    async def scene(model: ServedModel, helds: list[Held]) -> None:
        for _ in range(3):
            one = job(helds[0], "a circle")
            model.submit(one)
            await told(one, Finished)
        assert [len(held.passes) for held in helds] == [3, 0, 0]

    played(scene)


def test_several_passes_are_drawn_side_by_side_and_are_as_alone(played):
    async def scene(model: ServedModel, helds: list[Held]) -> None:
        whole, *narrow = helds
        for held in helds:
            held.gate.clear()
        first = job(whole, "yellow")
        model.submit(first)
        await _entered(whole)
        jobs = [job(whole, prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
        for one in jobs:
            model.submit(one)
        await asyncio.sleep(0.05)
        assert not any(held.passes for held in narrow), "beside a pass that has all cores nothing is drawn"
        whole.gate.set()
        for held in narrow:
            await _entered(held)  # both, before either has ended
        assert sorted(len(held.passes[0]) for held in narrow) == [2, 4]
        assert len(whole.passes) == 1
        for held in narrow:
            held.gate.set()
        images = [(await told(one, Finished))[0].image for one in jobs]
        for seed, (prompt, image) in enumerate(zip(PROMPTS, images, strict=True)):
            assert np.array_equal(pixels(image.image), whole.alone(prompt, seed)), "joined is as alone"
        assert [await model.idle(30), sum(len(held.passes) for held in narrow)] == [True, 3]

    played(scene)


def test_a_late_request_goes_to_the_lane_that_is_free(played):
    async def scene(model: ServedModel, helds: list[Held]) -> None:
        whole, *narrow = helds
        whole.gate.clear()
        model.submit(job(whole, "yellow"))
        await _entered(whole)
        waiting = [job(whole, prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
        for one in waiting:
            model.submit(one)
        narrow[1].gate.clear()
        whole.gate.set()
        await _entered(narrow[1])
        late = job(whole, "blue", seed=9)
        model.submit(late)
        (drawn,) = await told(late, Finished)
        assert not narrow[1].gate.is_set(), "the other one is still drawing"
        narrow[1].gate.set()
        assert np.array_equal(pixels(drawn.image.image), whole.alone("blue", 9))

    played(scene)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_ends_the_model(played):
    async def scene(model: ServedModel, helds: list[Held]) -> None:
        def failing(lane: Lane, units: Any) -> None:
            raise KeyError(units)

        helds[0].gate.clear()
        model.submit(job(helds[0], "yellow"))
        await _entered(helds[0])
        waiting = [job(helds[0], prompt) for prompt in PROMPTS]
        for one in waiting:
            model.submit(one)
        model._draw = failing  # type: ignore[method-assign]  # what no error of an image is
        helds[0].gate.set()
        for one in waiting:
            while not isinstance(await one.news.get(), Failed):
                pass
        await asyncio.to_thread(model._thread.join, 30)
        assert model.has_died
        assert not model.is_ready

    played(scene)


def test_lanes_share_weights_and_cores(batched_bundle):
    lanes = open_lanes(batched_bundle, 2, threads=2)
    assert [lane.is_whole for lane in lanes] == [True, False, False]
    assert len({id(lane.pipe.bundle.weights) for lane in lanes}) == 1
    assert len({str(lane.pipe.batch_sizes) for lane in lanes}) == 1
    for lane in lanes:
        lane.pipe.close()


@pytest.mark.parametrize(
    ("threads", "memory", "expected"),
    [(2, None, 3), (1, None, 1), (2, 2**20, 1)],
    ids=["two cores", "one core", "little memory"],
)
def test_nobody_says_how_many(batched_bundle, monkeypatch, threads: int, memory: int | None, expected: int):
    if memory is not None:
        monkeypatch.setattr(module, "memory_bytes", lambda: memory)
    lanes = open_lanes(batched_bundle, None, threads=threads)
    assert len(lanes) == expected
    for lane in lanes:
        lane.pipe.close()


def test_a_budget_is_that_of_all(batched_bundle):
    (lane,) = open_lanes(batched_bundle, 1)
    once = lane.pipe.memory_need.total_bytes
    lane.pipe.close()
    (lane,) = open_lanes(batched_bundle, None, threads=2, memory_budget=once + 1)
    lane.pipe.close()
    with pytest.raises(DeviceMemoryError, match=r"2 instances of .* need"):
        open_lanes(batched_bundle, 2, threads=2, memory_budget=once + 1)


def test_more_than_there_are_threads(batched_bundle):
    with pytest.raises(InputError, match="3 instances on 2 threads"):
        open_lanes(batched_bundle, 3, threads=2)


def test_engines_that_share_one_pool(batched_bundle, monkeypatch):
    monkeypatch.setattr(OnnxRuntimeBackend, "keeps_threads_apart", lambda self, threads: False)
    (lane,) = open_lanes(batched_bundle, None, threads=2)
    lane.pipe.close()
    with pytest.raises(InputError, match="threads of the process"):
        open_lanes(batched_bundle, 2, threads=2)
