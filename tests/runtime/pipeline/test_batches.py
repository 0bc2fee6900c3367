"""Passes of several images: what a pipeline puts together, and that each image is what it is alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvar import Pipeline, SamplingParams
from fastvar.engines.device import HostDevice
from fastvar.errors import DeviceMemoryError, ImagesFailed, InputError, NumericsError
from fastvar.runtime.requests.passes import ImageRequest, passes
from fastvar.runtime.requests.settings import SamplingSettings

PROMPTS = ["a red circle", "a small blue square", "a green triangle", "a circle", "yellow"]
GUIDED, UNGUIDED = SamplingSettings(3.0, 1.0, 0.9), SamplingSettings(1.0, 1.0, 0.9)


@pytest.fixture(scope="module")
def pipe(batched_bundle: Path) -> Pipeline:
    return Pipeline.load(batched_bundle)


@pytest.fixture(scope="module")
def alone(batched_bundle: Path) -> Pipeline:
    return Pipeline.load(batched_bundle, batch=1)


def ran(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Passes from now on: guidance rows and images of each."""
    found: list[tuple[int, int]] = []
    session = pipe._session
    workspace = session.workspace

    def counted(rows: int, images: int = 1) -> Any:
        found.append((rows, images))
        return workspace(rows, images)

    monkeypatch.setattr(session, "workspace", counted)
    return found


def assert_equal(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> None:
    assert len(images) == len(others)
    for place, (one, other) in enumerate(zip(images, others, strict=True)):
        assert np.array_equal(np.asarray(one), np.asarray(other)), f"image {place}"


# What goes into a pass


@pytest.mark.parametrize(
    ("count", "sizes", "expected"),
    [(1, [1, 2, 4], [1]), (7, [1, 2, 4], [4, 2, 1]), (9, [1, 4], [4, 4, 1]), (3, [1, 4], [1, 1, 1]), (3, [1], [1] * 3)],
)
def test_the_largest_passes_first_the_rest_in_smaller_ones(count: int, sizes: list[int], expected: list[int]):
    requests = [ImageRequest(i, "", None, i, GUIDED) for i in range(count)]
    made = passes(requests, lambda _: sizes)
    assert [len(one) for one in made] == expected
    assert [request.index for one in made for request in one] == list(range(count))


def test_images_with_guidance_and_without_share_no_pass():
    requests = [ImageRequest(i, "", None, i, (GUIDED, UNGUIDED)[i % 2]) for i in range(5)]
    made = passes(requests, lambda rows: [1, 2] if rows == 2 else [1])
    assert [[request.index for request in one] for one in made] == [[0, 2], [1], [3], [4]]


def test_lists_and_num_images_share_passes(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch):
    found = ran(pipe, monkeypatch)
    pipe(PROMPTS, seed=3)
    assert found == [(2, 4), (2, 1)]
    found.clear()
    pipe(PROMPTS[:3], num_images=2, guidance_scale=1.0)
    assert found == [(1, 4), (1, 2)]


# Each image is what it is alone


def test_images_with_settings_of_their_own(pipe: Pipeline, alone: Pipeline):
    settings = {
        "seed": [5, 6, 7, 8, 9],
        "guidance_scale": [3.0, 2.0, 1.0, 4.5, 1.0],
        "tau": [1.0, 0.8, 0.7, 0.9, 1.1],
        "top_p": [0.9, 0.95, 1.0, 0.8, 0.97],
        "negative_prompt": [None, "a white square", None, None, None],
    }
    out = pipe(PROMPTS, **settings)
    for place, prompt in enumerate(PROMPTS):
        own = alone(prompt, **{name: values[place] for name, values in settings.items()})
        assert_equal(out.images[place : place + 1], own.images)
        assert out.image_settings[place] == own.settings
    assert out.seeds == settings["seed"]
    assert out.prompts == PROMPTS
    assert out.indices == [0, 1, 2, 3, 4]
    assert "tau" not in out.settings, "what images do not share is told of each"
    assert out.settings["policy"] == out.image_settings[0]["policy"]


def test_params_of_each_prompt(pipe: Pipeline, alone: Pipeline):
    params = [SamplingParams(seed=4, tau=0.8, num_images=2), SamplingParams(seed=9)]
    out = pipe(PROMPTS[:2], params)
    assert out.seeds == [4, 5, 9]
    own = [*alone(PROMPTS[0], params[0]).images, *alone(PROMPTS[1], params[1]).images]
    assert_equal(out.images, own)


def test_seeds_of_each_image(pipe: Pipeline, alone: Pipeline):
    out = pipe(PROMPTS[0], num_images=3, seed=[11, 2, 7])
    assert out.seeds == [11, 2, 7]
    assert_equal(out.images, [alone(PROMPTS[0], seed=seed).images[0] for seed in out.seeds])


def test_edits_share_a_pass(pipe: Pipeline, alone: Pipeline, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(2)]
    masks = [np.zeros((64, 64), bool) for _ in range(2)]
    masks[0][:32, :32] = masks[1][20:60, 40:] = True
    found = ran(pipe, monkeypatch)
    out = pipe.inpaint(images, masks, PROMPTS[:2], seed=[1, 2])
    large = pipe.upscale(images, PROMPTS[:2], seed=[1, 2])
    assert found == [(2, 2), (2, 2)]
    assert_equal(out.images, [alone.inpaint(images[i], masks[i], PROMPTS[i], seed=1 + i).images[0] for i in range(2)])
    assert_equal(large.images, [alone.upscale(images[i], PROMPTS[i], seed=1 + i).images[0] for i in range(2)])


# What is told


def test_events_tell_the_image_and_its_own_preview(pipe: Pipeline, alone: Pipeline):
    events: list[Any] = []
    ends: list[int] = []
    pipe(
        PROMPTS[:3],
        seed=[1, 2, 3],
        callback_on_scale_end=lambda event: events.append((event.image, event.index, event.images, event.preview())),
        callback_on_image_end=lambda drawn: ends.append(drawn.index),
    )
    scales = len(pipe.manifest.plan.steps)
    assert [image for image, *_ in events] == [0, 1] * scales + [2] * scales
    assert [images for _, _, images, _ in events] == [2] * 2 * scales + [1] * scales
    assert ends == [0, 1, 2]
    own = [event.preview() for event in alone.stream(PROMPTS[1], seed=2)]
    assert_equal([preview for image, *_, preview in events if image == 1], own)


def test_timings_are_those_of_the_pass(pipe: Pipeline):
    out = pipe(PROMPTS[:3], seed=1)
    assert [timing.images for timing in out.timings] == [2, 2, 1]
    assert out.timings[0].scales == out.timings[1].scales
    assert {scale.images for scale in out.timings[0].scales} == {2}


# What is wrong


def test_an_image_that_fails_fails_alone(pipe: Pipeline, alone: Pipeline, monkeypatch: pytest.MonkeyPatch):
    broken_seed = 77
    whole = pipe._sampler._noises

    def poisoned(workspace: Any, requests: Sequence[ImageRequest]) -> Any:
        noises = whole(workspace, requests)
        for place, request in enumerate(requests):
            if request.seed == broken_seed:
                workspace.failed_on_purpose = place
        return noises

    monkeypatch.setattr(pipe._sampler, "_noises", poisoned)
    device = pipe._session.device
    workspace = pipe._session.workspace(2, 4)
    calls = workspace.layout.steps[1]
    view = workspace._bound.memory.ref(workspace.layout, calls.sampling_head.tensors["logits"])
    read = HostDevice.read

    def reading(self: HostDevice, ref: Any) -> Any:
        found = read(self, ref)
        if ref.address == view.address and getattr(workspace, "failed_on_purpose", None) is not None:
            found = found.copy()
            found.reshape(-1, 4, found.shape[-1])[0, workspace.failed_on_purpose] = np.nan
        return found

    monkeypatch.setattr(type(device), "read", reading)
    kept: list[int] = []
    with pytest.raises(ImagesFailed, match="1 of 4 images failed: image 2: scale 2") as error:
        pipe(PROMPTS[:4], seed=[1, 2, broken_seed, 4], callback_on_image_end=lambda drawn: kept.append(drawn.index))
    assert list(error.value.failed) == [2]
    assert isinstance(error.value, NumericsError)
    assert "the 3 others are in this error's `output`" in error.value.fix
    assert error.value.output.indices == kept == [0, 1, 3]
    monkeypatch.undo()
    own = [alone(PROMPTS[i], seed=i + 1).images[0] for i in (0, 1, 3)]
    assert_equal(error.value.output.images, own)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tau": [0.9, 0.8]}, "tau is a list of 2, for 3 prompts or labels"),
        ({"params": [SamplingParams()]}, "params is a list of 1, for 3 prompts or labels"),
        ({"seed": [1, 2]}, "2 seeds for 3 prompts or labels and 3 images"),
        ({"negative_prompt": ["a"] * 4}, "negative_prompt is a list of 4"),
        ({"params": [SamplingParams(), None, 3]}, "params None is a NoneType"),
        ({"guidance_scale": [1.0, 2.0, float("nan")]}, "guidance_scale nan is out of range"),
        ({"guidance_scale": [2.0, 1.0, 2.0], "negative_prompt": ["a", "b", "c"]}, "no effect at guidance_scale 1"),
        ({"guidance_scale": [2.0, 1.0, 2.0], "negative_prompt": [None, "b", None]}, "no effect at guidance_scale 1"),
    ],
)
def test_lists_that_do_not_fit(pipe: Pipeline, changes: dict[str, Any], problem: str):
    with pytest.raises(InputError, match=problem):
        pipe(PROMPTS[:3], **changes)


def test_a_negative_prompt_for_some_goes_with_their_guidance(
    pipe: Pipeline, alone: Pipeline, monkeypatch: pytest.MonkeyPatch
):
    """Those that have one, one that has none, and one without guidance: two passes, each image as alone."""
    found = ran(pipe, monkeypatch)
    changes = {"guidance_scale": [2.0, 2.0, 1.0], "negative_prompt": ["a square", None, None], "seed": [1, 2, 3]}
    out = pipe(PROMPTS[:3], **changes)
    assert found == [(2, 2), (1, 1)]
    for place, image in enumerate(out.images):
        own = {name: values[place] for name, values in changes.items()}
        assert_equal([image], alone(PROMPTS[place], **own).images)


def test_a_negative_prompt_for_some_where_classes_are_drawn(var_editing_bundle: Path):
    with pytest.raises(InputError, match="var models read no negative prompt"):
        Pipeline.load(var_editing_bundle)(class_labels=[1, 2], negative_prompt=[None, "a square"])


def test_images_for_another_number_of_prompts(pipe: Pipeline):
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(InputError, match="image is a list of 2, for 3 prompts or labels"):
        pipe.upscale([picture] * 2, PROMPTS[:3])


def test_a_batch_that_was_not_built(batched_bundle: Path, tiny_bundle: Path):
    with pytest.raises(InputError, match="batch 3, and the bundle has engines for passes of 1, 2, 4") as error:
        Pipeline.load(batched_bundle, batch=3)
    assert "rebuild with --batch 1,2,3,4" in error.value.fix
    with pytest.raises(InputError, match=r"batch 2, and the bundle has engines for passes of 1\n"):
        Pipeline.load(tiny_bundle, batch=2)


# Memory


def test_a_budget_chooses_the_batch(batched_bundle: Path):
    sizes = {batch: Pipeline.load(batched_bundle, batch=batch)._session._memory.arena_bytes for batch in (1, 2, 4)}
    assert sizes[1] < sizes[2] < sizes[4]
    with pytest.raises(DeviceMemoryError) as error:
        Pipeline.load(batched_bundle, memory_budget=1 << 20)
    assert "this bundle needs" in error.value.problem
    for batch in (1, 2, 4):
        whole = Pipeline.load(batched_bundle, batch=batch)
        from fastvar.runtime.memory.fit import total_need
        from fastvar.runtime.memory.layout import build_layout

        layouts = [build_layout(whole.manifest, *s.batch) for s in whole.manifest.sets if s.images <= batch]
        need = total_need(whole.manifest, layouts, on_host=True).total_bytes
        chosen = Pipeline.load(batched_bundle, memory_budget=need)
        assert chosen.batch_sizes["on"][-1] == batch
        with pytest.raises(DeviceMemoryError):
            Pipeline.load(batched_bundle, batch=batch, memory_budget=need - 1)
