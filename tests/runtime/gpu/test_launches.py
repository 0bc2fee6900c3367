"""On a fake GPU: one launch a scale, and no wait that nobody asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvar import Pipeline
from tests.fakes.cuda import FakeDriver
from tests.runtime.gpu.drawing import GRAPH, PROMPT, SCALES, WAIT, Load, pixels


@pytest.fixture
def warm(gpu_bundle: Path, load: Load) -> tuple[Pipeline, FakeDriver]:
    """Both workspaces are made, and the list of calls is empty."""
    gpu, driver = load(gpu_bundle)
    for guidance_scale in (1, 3):
        gpu(PROMPT, guidance_scale=guidance_scale)
    driver.calls.clear()
    return gpu, driver


def test_every_scale_is_one_launch(warm: tuple[Pipeline, FakeDriver]):
    gpu, driver = warm
    gpu(PROMPT, negative_prompt="a white square")
    assert driver.count[GRAPH] == 1 + SCALES + 1, "the condition, every scale, the image decoder"
    assert driver.count["enqueue"] == 2, "the text encoder twice"
    assert driver.count["cuMemAlloc"] == driver.count["cuMemHostAlloc"] == driver.count["cuGraphInstantiate"] == 0


def test_nothing_waits_between_scales_when_nobody_listens(warm: tuple[Pipeline, FakeDriver]):
    gpu, driver = warm
    gpu(PROMPT)
    last_scale, decoder = [i for i, name in enumerate(driver.calls) if name == GRAPH][-2:]
    assert WAIT not in driver.calls[:last_scale]
    assert driver.calls[last_scale:decoder].count(WAIT) == SCALES, "the logits of every scale"
    assert driver.calls[decoder:].count(WAIT) == 1, "the image"


def test_with_a_listener_every_event_is_one_wait(warm: tuple[Pipeline, FakeDriver]):
    gpu, driver = warm
    waits: list[tuple[int, int]] = []
    gpu(PROMPT, callback_on_scale_end=lambda _: waits.append((driver.count[GRAPH], driver.count[WAIT])))
    assert waits == [(2, 1), (3, 2), (4, 3)]


def test_event_comes_when_its_scale_is_done(cpu: Pipeline, warm: tuple[Pipeline, FakeDriver]):
    gpu, _ = warm
    seen: list[bytes] = []
    gpu(PROMPT, seed=7, callback_on_scale_end=lambda event: seen.append(event.preview().tobytes()))
    assert seen == pixels([event.preview() for event in cpu.stream(PROMPT, seed=7)])
