"""The tiny model on a fake GPU: the same bits as on the CPU, whatever is drawn and however it is launched."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fastvar import Pipeline
from fastvar.errors import BackendError
from tests.fakes.cuda import FakeDriver
from tests.fakes.tensorrt import fake_gpu_bundle
from tests.runtime.gpu.drawing import DRAWINGS, GRAPH, PROMPT, SCALES, Load, pixels, scratch_of


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
def test_images_are_those_of_the_cpu(cpu: Pipeline, gpu_bundle: Path, load: Load, offload: bool):
    """All on one pipeline, so that with and without guidance share their memory in turn."""
    gpu, _ = load(gpu_bundle, offload_text_encoder=offload)
    for sampling_mode in (*DRAWINGS, DRAWINGS[0]):
        assert pixels(gpu(PROMPT, **sampling_mode).images) == pixels(cpu(PROMPT, **sampling_mode).images), sampling_mode


@pytest.mark.parametrize("sampling_mode", [{"seed": 7}, {"seed": 7, "guidance_scale": 1}], ids=["guided", "free"])
def test_keys_take_a_detour_to_the_same_image(
    cpu: Pipeline, tiny_bundle: Path, load: Load, tmp_path: Path, sampling_mode: dict[str, object]
):
    """As if the library wanted addresses that are multiples of more than a token's keys."""
    gpu, driver = load(fake_gpu_bundle(tiny_bundle, tmp_path / "bundle", scratch_of, alignment=2048))
    assert pixels(gpu(PROMPT, **sampling_mode).images) == pixels(cpu(PROMPT, **sampling_mode).images)
    assert driver.count["cuMemcpyDtoDAsync"] > 0


def test_launches_made_one_by_one_draw_the_same(cpu: Pipeline, gpu_bundle: Path, load: Load):
    gpu, driver = load(gpu_bundle, cuda_graphs=False)
    assert pixels(gpu(PROMPT, seed=7).images) == pixels(cpu(PROMPT, seed=7).images)
    assert driver.count[GRAPH] == driver.count["cuStreamBeginCapture"] == 0


def test_launches_that_cannot_be_recorded_say_how_to_do_without(gpu_bundle: Path, load: Load):
    driver = FakeDriver()
    driver.failing["cuStreamEndCapture"] = driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    gpu, _ = load(gpu_bundle, driver)
    with pytest.raises(BackendError, match="cannot be recorded as a CUDA graph: cuStreamEndCapture failed") as error:
        gpu(PROMPT)
    assert "--no-cuda-graphs" in error.value.fix


def test_prompts_do_not_leak_into_each_other(cpu: Pipeline, gpu_bundle: Path, load: Load):
    gpu, _ = load(gpu_bundle, offload_text_encoder=True)
    prompts = ["a large striped red circle above a small blue square on white", "a red circle"]
    assert pixels(gpu(prompts, seed=0).images) == pixels(cpu(prompts, seed=0).images)


@pytest.mark.parametrize("sampling_mode", [{"seed": 7}, {"seed": 7, "guidance_scale": 1}], ids=["guided", "free"])
def test_previews_are_those_of_the_cpu(cpu: Pipeline, gpu_bundle: Path, load: Load, sampling_mode: dict[str, object]):
    gpu, _ = load(gpu_bundle)
    found, expected = (pixels([e.preview() for e in pipe.stream(PROMPT, **sampling_mode)]) for pipe in (gpu, cpu))
    assert len(found) == SCALES
    assert found == expected


def test_abandoned_stream_leaves_nothing_behind(cpu: Pipeline, gpu_bundle: Path, load: Load):
    gpu, _ = load(gpu_bundle)
    stream = gpu.stream("a green triangle", seed=1)
    next(stream)
    stream.close()
    assert pixels(gpu(PROMPT, seed=7).images) == pixels(cpu(PROMPT, seed=7).images)


def test_threads_share_a_pipeline(cpu: Pipeline, gpu_bundle: Path, load: Load):
    gpu, driver = load(gpu_bundle)
    found: dict[int, list[bytes]] = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: pixels(gpu(PROMPT, seed=s).images)})) for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {seed: pixels(cpu(PROMPT, seed=seed).images) for seed in (1, 2)}
    assert {thread.ident for thread in threads} <= set(driver.contexts)


def test_timings_are_measured_on_the_device(gpu_bundle: Path, load: Load):
    gpu, _ = load(gpu_bundle)
    (timing,) = gpu(PROMPT).timings
    assert [s.index for s in timing.scales] == [0, 2, 6]
    assert min(timing.text_ms, timing.decode_ms, *(s.ms for s in timing.scales)) > 0
