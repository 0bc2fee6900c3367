"""Arguments by diffusers' names come to the same images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvar import Pipeline
from fastvar.errors import InputError

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle) as found:
        yield found


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_their_names_draw_the_same(pipe: Pipeline):
    own = pipe(PROMPT, num_images=2, seed=7, guidance_scale=2.0)
    for generator in (7, torch.Generator().manual_seed(7), np.int64(7)):
        theirs = pipe(PROMPT, num_images_per_prompt=2, generator=generator, guidance_scale=2.0, width=256, height=256)
        assert theirs.seeds == [7, 8]
        assert np.array_equal(pixels(theirs.images), pixels(own.images))
    listed = pipe([PROMPT, PROMPT], generator=[torch.Generator().manual_seed(seed) for seed in (7, 8)])
    assert listed.seeds == [7, 8]


def test_images_as_an_array(pipe: Pipeline):
    found = pipe(PROMPT, seed=7, num_images=2, output_type="np").images
    assert found.shape == (2, 256, 256, 3)
    assert found.dtype == np.float32
    assert np.array_equal(np.rint(found * 255).astype(np.uint8), pixels(pipe(PROMPT, seed=7, num_images=2).images))
    assert pipe(PROMPT, seed=7, output_type="pil").images[0].size == (256, 256)


def test_none_is_as_good_as_nothing(pipe: Pipeline):
    nothing = dict.fromkeys(("num_images_per_prompt", "generator", "width", "height", "output_type"))
    assert len(pipe(PROMPT, **nothing).images) == 1


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"width": 512}, "width 512, but the bundle draws 256x256"),
        ({"height": "256"}, "height '256'"),
        ({"output_type": "latent"}, "output_type 'latent' not understood"),
        ({"generator": 1, "seed": 2}, "generator and seed are the same parameter"),
        ({"num_images_per_prompt": 2, "num_images": 2}, "the same parameter"),
        ({"generator": "cpu"}, "seed 'cpu'"),
        ({"num_inference_steps": 4}, "no sampling parameter num_inference_steps"),
    ],
)
def test_what_is_not_understood(pipe: Pipeline, asked: dict[str, Any], told: str):
    with pytest.raises(InputError, match=told):
        pipe(PROMPT, **asked)
