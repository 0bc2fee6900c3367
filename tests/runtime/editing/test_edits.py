"""Super-resolution and in-painting on a tiny random model: tokens that are kept come out, the others are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar import Pipeline
from fastvar.core.resize import bilinear_matrix
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import InputError, NumericsError
from fastvar.export.models.infinity.tokenizer import ImageTokenizer
from fastvar.runtime.editing.edits import FEATHER, back_projected, inpainting, scales_of, upscaling
from fastvar.runtime.editing.given_tokens import given_tokens
from fastvar.runtime.editing.quantiser import bits_of, quantize, tokens_of
from fastvar.runtime.editing.source_image import read_mask, touched
from fastvar.runtime.requests.inputs import TextInput
from fastvar.runtime.requests.settings import SamplingSettings

PROMPT = "a red circle above a blue square"
EXECUTED = {0: (1, 1), 2: (4, 4), 6: (16, 16)}


@pytest.fixture(scope="module")
def pipe(editing_bundle: Path) -> Pipeline:
    return Pipeline.load(editing_bundle)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth random colours, 256x256."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    return Image.fromarray(levels).resize((256, 256), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """White in the lower right, not along the borders of tokens."""
    image = Image.new("L", (256, 256))
    image.paste(255, (133, 149, 219, 241))
    return image


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def round_trip(checkpoint: Any, image: Image.Image) -> np.ndarray:
    """decode(quantize(encode)) in torch, over the executed scales: levels [256, 256, 3]."""
    tokenizer = ImageTokenizer(checkpoint.image_tokenizer).eval()
    tokenizer.load_state_dict({n: w.float() for n, w in checkpoint.image_tokenizer_weights.items()})
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        _, total = tokenizer.quantize(tokenizer.encoder(pixels), list(EXECUTED.values()))
        return ((tokenizer.decode(total)[0].permute(1, 2, 0) + 1) * 127.5).round().numpy().astype(int)


def test_everything_kept_is_the_round_trip_of_the_image_tokenizer(pipe: Pipeline, tiny_checkpoint, picture):
    out = pipe.upscale(picture, PROMPT, keep_scales=7, consistency=False)
    expected = round_trip(tiny_checkpoint, picture)
    assert expected.std() > 1, "not a flat image"
    assert np.abs(levels(out.images[0]) - expected).max() <= 1
    again = pipe.upscale(picture, "white", keep_scales=7, consistency=False, seed=9)
    assert again.images[0].tobytes() == out.images[0].tobytes(), "neither prompt nor seed has a say"


def drawn_bits(pipe: Pipeline, edit: Any, seed: int) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Scale -> bits [L, bits]: of the image alone, of the image over the sum that was drawn before, and those that were
    drawn, the latter read off the running sum.
    """
    workspace = pipe._session.workspace(2)
    latent = workspace.encode_image(edit.pixels)
    given = given_tokens(latent, edit.kept, pipe.manifest, pipe.bundle.weights)
    workspace.give(TextInput(pipe._reader.subjects.tokenizer.encode(PROMPT)))
    own = dict(zip(EXECUTED, quantize(latent, EXECUTED.values())[0], strict=True))
    found, before = {}, np.zeros(latent.shape)
    noise = given.noise(seed, workspace.summed_before)
    for calls, _ in workspace.run_scales(noise, SamplingSettings(3.0, 1.0, 0.97)):
        index, size = calls.step.index, calls.step.size
        over = bits_of(latent - before, size)
        summed = workspace.summed_codes(calls).astype(float)
        inverse = np.linalg.pinv(bilinear_matrix(size[0], 16))
        codes = inverse @ (summed - before) @ inverse.T
        found[index] = tokens_of(own[index], 1), tokens_of(over, 1), codes.reshape(8, -1).T > 0
        before = summed
    return found


def test_upscaling_keeps_the_scales_that_the_image_fills_and_draws_the_rest(pipe: Pipeline, picture):
    small = picture.resize((70, 70))
    edit = upscaling(small, pipe.manifest.plan, keep_scales=None, fit="exact", consistency=True)
    assert {index: kept.all() for index, kept in edit.kept.items()} == {0: True, 2: True, 6: False}
    assert edit.record == {"task": "upscale", "from": "70x70", "keep_scales": 3, "consistency": True}
    bits = drawn_bits(pipe, edit, seed=1)
    for index in (0, 2):
        own, _, drawn = bits[index]
        np.testing.assert_array_equal(own, drawn)
    _, image, drawn = bits[6]
    assert (image != drawn).any(axis=1).mean() > 0.5


def test_inpainting_keeps_the_tokens_that_the_mask_does_not_touch(pipe: Pipeline, picture, mask):
    edit = inpainting(picture, read_mask(mask), pipe.manifest.plan, fit="exact", composite=True)
    bits = drawn_bits(pipe, edit, seed=1)
    rows, columns = slice(9, 16), slice(8, 14)  # 149 to 241 and 133 to 219 pixels, 16 a token
    expected = np.ones((16, 16), bool)
    expected[rows, columns] = False
    np.testing.assert_array_equal(edit.kept[6].reshape(16, 16), expected)
    np.testing.assert_array_equal(edit.kept[0], [False])
    for index, (own, image, drawn) in bits.items():
        kept = edit.kept[index]
        np.testing.assert_array_equal(image[kept], drawn[kept])
        assert (image[~kept] != drawn[~kept]).any(), f"scale {index}"
        assert (own[kept] != image[kept]).any() == (index > 0), "they make up for what was drawn"
    assert edit.record == {"task": "inpaint", "redrawn": round(42 / 256, 4), "composite": True}


def test_same_seed_same_image_and_seeds_count_up(pipe: Pipeline, picture, mask):
    small = picture.resize((64, 64))
    for draw in (
        lambda **s: pipe.upscale(small, PROMPT, consistency=False, **s),
        lambda **s: pipe.inpaint(picture, mask, PROMPT, **s),
    ):
        pair = draw(seed=5, num_images=2)
        assert (pair.seeds, pair.prompts) == ([5, 6], [PROMPT, PROMPT])
        assert pair.images[0].tobytes() != pair.images[1].tobytes()
        pipe("a green circle", seed=1)  # leaves other things in memory
        assert draw(seed=6).images[0].tobytes() == pair.images[1].tobytes()


def test_drawing_is_as_it_was_with_an_encoder_in_the_bundle(pipe: Pipeline, tiny_bundle: Path):
    assert pipe(PROMPT, seed=7).images[0].tobytes() == Pipeline.load(tiny_bundle)(PROMPT, seed=7).images[0].tobytes()


def test_every_setting_reaches_the_drawing(pipe: Pipeline, picture):
    small, found = picture.resize((64, 64)), []
    for change in ({}, {"tau": 0.1}, {"guidance_scale": 1}, {"top_p": 0.3}, {"negative_prompt": "a white square"}):
        out = pipe.upscale(small, PROMPT, seed=2, consistency=False, **change)
        found.append(out.images[0].tobytes())
        assert {key: out.settings[key] for key in change} == change
    assert len(set(found)) == len(found)
    events = []
    pipe.upscale(small, PROMPT, callback_on_scale_end=events.append)
    assert [event.index for event in events] == list(EXECUTED)


def test_upscaled_image_gives_the_small_one_again(pipe: Pipeline, picture):
    small = picture.resize((64, 64))
    raw = pipe.upscale(small, PROMPT, seed=3, consistency=False).images[0]
    out = pipe.upscale(small, PROMPT, seed=3).images[0]
    assert out.tobytes() == back_projected(raw, small).tobytes()
    off = [np.abs(levels(image.reduce(4)) - levels(small)).mean() for image in (raw, out)]
    assert off[1] < 1 < 10 < off[0]


def test_back_projection_leaves_alone_what_agrees():
    flat = Image.new("RGB", (32, 32), (90, 120, 30))
    assert back_projected(flat, Image.new("RGB", (5, 7), (90, 120, 30))).tobytes() == flat.tobytes()


def test_outside_the_mask_the_pixels_are_the_images_own(pipe: Pipeline, picture, mask):
    out = levels(pipe.inpaint(picture, mask, PROMPT, seed=4).images[0])
    decoded = levels(pipe.inpaint(picture, mask, PROMPT, seed=4, composite=False).images[0])
    inside = np.asarray(mask) > 0
    far = np.ones((256, 256), bool)
    far[149 - 2 * FEATHER : 241 + 2 * FEATHER, 133 - 2 * FEATHER : 219 + 2 * FEATHER] = False
    np.testing.assert_array_equal(out[inside], decoded[inside])
    np.testing.assert_array_equal(out[far], levels(picture)[far])
    assert (decoded[far] != levels(picture)[far]).any()


def test_arrays_in_place_of_images(pipe: Pipeline, picture, mask):
    expected = pipe.inpaint(picture, mask, PROMPT, seed=4).images[0].tobytes()
    array, marked = np.asarray(picture), np.asarray(mask) > 0
    for given in (marked, marked.astype(int), marked.astype(float), np.asarray(mask)):
        assert pipe.inpaint(array, given, PROMPT, seed=4).images[0].tobytes() == expected
    erased = Image.fromarray(np.dstack([array, np.where(marked, 0, 255).astype(np.uint8)]))
    assert pipe.inpaint(picture, erased, PROMPT, seed=4).images[0].tobytes() == expected


def test_masks_of_nothing_and_of_everything(pipe: Pipeline, picture, mask):
    for marked, named in ((False, "the mask marks nothing"), (True, "the mask leaves nothing of the image")):
        with pytest.raises(InputError, match=named):
            pipe.inpaint(picture, np.full((256, 256), marked), PROMPT)


@pytest.mark.parametrize("wrong", [{"composite": "no"}, {"composite": 1}])
def test_composite_is_true_or_false(pipe: Pipeline, picture, mask, wrong: dict[str, object]):
    with pytest.raises(InputError, match=r"composite .* is"):
        pipe.inpaint(picture, mask, PROMPT, **wrong)
    with pytest.raises(InputError, match="consistency 'no' is text"):
        pipe.upscale(picture.resize((64, 64)), PROMPT, consistency="no")


@pytest.mark.parametrize("side", [96, 512])
def test_image_and_mask_of_other_sizes(pipe: Pipeline, picture, mask, side: int):
    """The mask's grid differs from the image's; what it marks is the same."""
    image = picture.resize((side, side))
    edit = inpainting(image, read_mask(mask), pipe.manifest.plan, fit="exact", composite=True)
    assert edit.image.size == (256, 256)
    np.testing.assert_array_equal(edit.kept[6], ~touched(read_mask(mask), (16, 16)).ravel())
    assert pipe.inpaint(image, mask, PROMPT).images[0].size == (256, 256)


def test_cropped_image_takes_its_mask_along(pipe: Pipeline, picture):
    wide, mask = Image.new("RGB", (512, 256)), Image.new("L", (1024, 512))
    wide.paste(picture, (128, 0))
    mask.paste(255, (256 + 266, 298, 256 + 438, 482))
    cut = inpainting(wide, read_mask(mask), pipe.manifest.plan, fit="crop", composite=True)
    assert cut.image.tobytes() == picture.tobytes()
    assert (~cut.kept[6]).reshape(16, 16).any(0).nonzero()[0].tolist() == list(range(8, 14))


@pytest.mark.parametrize(
    ("pixels", "scales"),
    [((16, 16), 1), ((63, 64), 2), ((64, 64), 3), ((128, 255), 5), ((255, 255), 6), ((99, 16), 1)],
)
def test_scales_of_an_image_are_those_whose_tokens_fit_into_it(pipe: Pipeline, pixels: tuple[int, int], scales: int):
    assert scales_of(pixels, pipe.manifest.plan) == scales


def test_memory_is_what_drawing_takes(pipe: Pipeline, tiny_bundle: Path):
    """The image encoder comes first and leaves nothing behind."""
    assert pipe._session._memory.arena_bytes == Pipeline.load(tiny_bundle)._session._memory.arena_bytes


def test_encoder_is_loaded_when_an_image_is_given(editing_bundle: Path, picture):
    pipe = Pipeline.load(editing_bundle)
    pipe(PROMPT)
    assert "encoder-16x16" not in pipe._session.engines._loaded
    pipe.upscale(picture.resize((64, 64)), PROMPT)
    assert "encoder-16x16" in pipe._session.engines._loaded


def test_encoder_that_is_not_finite(pipe: Pipeline, picture, monkeypatch: pytest.MonkeyPatch):
    workspace = pipe._session.workspace(2)
    monkeypatch.setattr(workspace, "read", lambda *_: np.full((1, 8, 16, 16), np.nan))
    with pytest.raises(NumericsError, match="the image encoder"):
        pipe.upscale(picture.resize((64, 64)), PROMPT)


def test_bundle_without_encoder_names_the_option(tiny_bundle: Path, picture, mask):
    pipe = Pipeline.load(tiny_bundle)
    for draw in (lambda: pipe.upscale(picture, PROMPT), lambda: pipe.inpaint(picture, mask, PROMPT)):
        with pytest.raises(InputError, match="no image encoder") as error:
            draw()
        assert "--with-encoder" in error.value.fix


def test_manifest_from_before_there_was_an_encoder(tiny_bundle: Path):
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.encoder == ""
    from fastvar.engines.bundle.manifest import manifest_from_json, manifest_to_json

    data = manifest_to_json(manifest)
    del data["encoder"]
    assert manifest_from_json(data) == manifest
    named = replace(manifest, encoder="encoder-16x16")
    assert manifest_from_json(manifest_to_json(named)) == named


def test_scales_kept_as_numpy_counts(pipe: Pipeline, picture):
    small = picture.resize((64, 64))
    assert pipe.upscale(small, PROMPT, keep_scales=np.int64(2)).settings["keep_scales"] == 2


@pytest.mark.parametrize("keep", [0, 8, -1, 2.0, True, "2", [2]])
def test_keep_scales_out_of_range(pipe: Pipeline, picture, keep: object):
    with pytest.raises(InputError, match="keep_scales"):
        pipe.upscale(picture.resize((64, 64)), PROMPT, keep_scales=keep)
