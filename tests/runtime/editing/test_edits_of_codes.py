"""Editing with a model that draws codes of classes: tokens that are kept come out, the others are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar import UNCONDITIONAL, Pipeline
from fastvar.core.noise import uniform_noise
from fastvar.core.policy import DENSE, PruningPolicy
from fastvar.errors import InputError
from fastvar.export.models.codebook.steps import Ranking
from fastvar.export.models.codebook.tokenizer import area_pool
from fastvar.runtime.editing.edits import FEATHER, inpainting, upscaling
from fastvar.runtime.editing.given_tokens import given_tokens
from fastvar.runtime.editing.source_image import read_mask
from fastvar.runtime.memory.layout import build_layout
from fastvar.runtime.requests.inputs import LabelInput
from fastvar.runtime.requests.settings import SamplingSettings
from tests.models import tiny_var
from tests.models.tiny_var import CONFIG, EXECUTED, PRUNED

SIDE, FINAL, SCALES = 128, (8, 8), 5
TOP_K, TOP_P = 20, 0.9


@pytest.fixture(scope="module")
def pipe(var_editing_bundle: Path) -> Pipeline:
    return Pipeline.load(var_editing_bundle)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory):
    """Pipelines of step modules by policy and way of drawing."""

    def made(policy: PruningPolicy, **options: Any) -> Pipeline:
        return tiny_var.modules(tmp_path_factory.mktemp("modules"), policy, **options)

    return made


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth random colours."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    return Image.fromarray(levels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """White in the lower right, not along the borders of tokens."""
    image = Image.new("L", (SIDE, SIDE))
    image.paste(255, (70, 83, 108, 121))
    return image


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def quantised(image: Image.Image, executed: dict[int, tuple[int, int]]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """What torch makes of an image: codes [L] of the executed scales, and their sum [1, channels, 8, 8]."""
    tokenizer = tiny_var.tokenizer()
    residual = tokenizer.encode(torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 127.5 - 1)
    codes, total = {}, torch.zeros_like(residual)
    for index, size in executed.items():
        own = tokenizer.quantize.nearest(area_pool(residual, size))
        added = tokenizer.quantize.contribution(tokenizer.quantize.lookup(own), index, SCALES, FINAL)
        codes[index], total, residual = own.flatten(), total + added, residual - added
    return codes, total


def decoded(total: torch.Tensor) -> np.ndarray:
    image = tiny_var.tokenizer().decode(total)[0].permute(1, 2, 0)
    return ((image + 1) * 127.5).round().numpy().astype(int)


def drawn_codes(pipe: Pipeline, edit: Any, seed: int, label: int = 3) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Scale -> codes of the image over the sum that was drawn before, as torch finds them, and those that the scale
    added to that sum.

    The latter are those that the logits give to the seed's numbers outside the kept tokens; what the engine added to
    its running sum is compared with what they add in torch.
    """
    workspace, quantizer = pipe._session.workspace(2), tiny_var.tokenizer().quantize
    latent = torch.from_numpy(workspace.encode_image(edit.pixels))
    given = given_tokens(latent.numpy(), edit.kept, pipe.manifest, pipe.bundle.weights)
    workspace.give(LabelInput(label))
    found, before = {}, torch.zeros(8, *FINAL)
    noise = given.noise(seed, workspace.summed_before)
    for calls, _ in workspace.run_scales(noise, SamplingSettings(3.0, None, TOP_P, TOP_K, 0.0)):
        index, size = calls.step.index, calls.step.size
        image = quantizer.nearest(area_pool((latent - before)[None], size)).flatten().numpy()
        logits = torch.from_numpy(workspace.read(calls.sampling_head, "logits").copy())
        ranking = Ranking(logits, CONFIG.codes, torch.tensor([1 - TOP_P]), torch.tensor([TOP_K]))
        uniform = torch.from_numpy(uniform_noise(seed, index, (len(logits), 1))[:, 0])
        codes = np.where(edit.kept[index], image, ranking.draw(uniform).numpy())
        grid = torch.from_numpy(codes).view(1, *size)
        summed = torch.from_numpy(workspace.summed_codes(calls).copy())
        expected = quantizer.contribution(quantizer.lookup(grid), index, SCALES, FINAL)[0]
        torch.testing.assert_close(summed - before, expected, atol=1e-4, rtol=0)
        found[index], before = (image, codes), summed
    return found


def test_codes_of_an_image_are_those_that_torch_gives_it(pipe: Pipeline, picture):
    edit = upscaling(picture, pipe.manifest.plan, keep_scales=SCALES, fit="exact", consistency=False)
    expected, _ = quantised(picture, EXECUTED)
    for index, (image, drawn) in drawn_codes(pipe, edit, seed=1).items():
        np.testing.assert_array_equal(image, expected[index].numpy())
        np.testing.assert_array_equal(drawn, image)
    assert len(expected[4].unique()) > 20, "not a flat image"


def test_everything_kept_is_the_images_own_reconstruction(pipe: Pipeline, picture):
    out = pipe.upscale(picture, class_labels=3, keep_scales=SCALES, consistency=False)
    expected = decoded(quantised(picture, EXECUTED)[1])
    assert expected.std() > 10
    assert np.abs(levels(out.images[0]) - expected).max() <= 1
    again = pipe.upscale(picture, class_labels=UNCONDITIONAL, keep_scales=SCALES, consistency=False, seed=9)
    assert again.images[0].tobytes() == out.images[0].tobytes(), "neither class nor seed has a say"


@pytest.mark.parametrize("policy", [PRUNED, DENSE], ids=["pruned", "dense"])
def test_inpainting_keeps_the_tokens_that_the_mask_does_not_touch(modules, picture, mask, policy: PruningPolicy):
    pipe = modules(policy)
    edit = inpainting(picture, read_mask(mask), pipe.manifest.plan, fit="exact", composite=True)
    expected = np.ones(FINAL, bool)
    expected[5:8, 4:7] = False  # 83 to 121 and 70 to 108 pixels, 16 a token
    np.testing.assert_array_equal(edit.kept[4].reshape(FINAL), expected)
    executed = {step.index: step.size for step in pipe.manifest.plan.steps}
    own = quantised(picture, executed)[0]
    codes = drawn_codes(pipe, edit, seed=1)
    assert list(codes) == list(executed)
    for index, (image, drawn) in codes.items():
        kept = edit.kept[index]
        np.testing.assert_array_equal(drawn[kept], image[kept])
        assert (image != own[index].numpy())[kept].any() == (index > 0), "they make up for what was drawn"
    image, drawn = codes[4]
    assert (image != drawn)[~edit.kept[4]].mean() > 0.5
    assert edit.record == {"task": "inpaint", "redrawn": round(9 / 64, 4), "composite": True}


def test_what_is_kept_makes_up_for_coarse_tokens_that_were_drawn(modules, picture, mask):
    """Forced regardless of what was drawn, the image's own tokens end farther from it."""
    pipe = modules(PRUNED)
    workspace = pipe._session.workspace(2)
    edit = inpainting(picture, read_mask(mask), pipe.manifest.plan, fit="exact", composite=False)
    latent = workspace.encode_image(edit.pixels)
    given = given_tokens(latent, edit.kept, pipe.manifest, pipe.bundle.weights)
    own_sums = {
        scale: quantised(picture, {i: size for i, size in EXECUTED.items() if i < scale})[1][0].numpy()
        for scale in EXECUTED
    }
    outside, errors = edit.kept[4].reshape(FINAL), []
    workspace.give(LabelInput(3))
    for sums in (own_sums.__getitem__, workspace.summed_before):
        steps = list(workspace.run_scales(given.noise(1, sums), SamplingSettings(3.0, None, TOP_P, TOP_K, 0.0)))
        errors.append(np.square(latent - workspace.summed_codes(steps[-1][0]))[:, outside].mean())
    assert errors[1] < 0.9 * errors[0], errors


def test_outside_the_mask_the_pixels_are_the_images_own(pipe: Pipeline, picture, mask):
    out = levels(pipe.inpaint(picture, mask, class_labels=3, seed=4).images[0])
    as_decoded = levels(pipe.inpaint(picture, mask, class_labels=3, seed=4, composite=False).images[0])
    inside, far = np.asarray(mask) > 0, np.ones((SIDE, SIDE), bool)
    far[83 - 2 * FEATHER : 121 + 2 * FEATHER, 70 - 2 * FEATHER : 108 + 2 * FEATHER] = False
    np.testing.assert_array_equal(out[inside], as_decoded[inside])
    np.testing.assert_array_equal(out[far], levels(picture)[far])
    own = decoded(quantised(picture, EXECUTED)[1])
    assert np.abs(as_decoded - own)[inside].mean() > 10, "inside it is drawn anew"


def test_another_class_edits_what_the_mask_shows(pipe: Pipeline, picture, mask):
    images = {
        label: pipe.inpaint(picture, mask, class_labels=label, seed=4).images[0] for label in (3, 7, UNCONDITIONAL)
    }
    assert len({image.tobytes() for image in images.values()}) == 3
    several = pipe.inpaint(picture, mask, class_labels=[3, "unconditional"], seed=4)
    assert several.prompts == ["3", "unconditional"]
    assert several.images[0].tobytes() == images[3].tobytes()


def test_images_of_a_pass_have_masks_of_their_own(modules, picture, mask):
    """Each makes up for what was drawn in its own place."""
    pipe, other = modules(PRUNED, batch=(1, 2)), picture.transpose(Image.Transpose.ROTATE_90)
    masks = [mask, mask.transpose(Image.Transpose.ROTATE_180)]
    together = pipe.inpaint([picture, other], masks, class_labels=[3, 5], seed=[1, 2], composite=False)
    assert [timing.images for timing in together.timings] == [2, 2]
    for place, (image, own) in enumerate(zip((picture, other), masks, strict=True)):
        alone = pipe.inpaint(image, own, class_labels=3 + 2 * place, seed=1 + place, composite=False)
        assert np.abs(levels(together.images[place]) - levels(alone.images[0])).max() <= 1, f"image {place}"


def test_same_seed_same_image_and_seeds_count_up(pipe: Pipeline, picture, mask):
    small = picture.resize((64, 64))
    for draw in (
        lambda **s: pipe.upscale(small, class_labels=3, consistency=False, **s),
        lambda **s: pipe.inpaint(picture, mask, class_labels=3, **s),
    ):
        pair = draw(seed=5, num_images=2)
        assert pair.images[0].tobytes() != pair.images[1].tobytes()
        pipe(class_labels=1, seed=1)  # leaves other things in memory
        assert draw(seed=6).images[0].tobytes() == pair.images[1].tobytes()


def test_every_scale_is_previewed(pipe: Pipeline, picture, mask):
    events: list[Any] = []
    out = pipe.inpaint(picture, mask, class_labels=3, seed=4, callback_on_scale_end=events.append)
    assert [event.index for event in events] == list(EXECUTED)
    previews = [event.preview() for event in events]
    assert {preview.size for preview in previews} == {(SIDE, SIDE)}
    assert len({preview.tobytes() for preview in previews}) == len(EXECUTED)
    assert out.images[0].tobytes() == pipe.inpaint(picture, mask, class_labels=3, seed=4).images[0].tobytes()


def test_upscaling_keeps_the_scales_that_the_image_fills(pipe: Pipeline, picture):
    small = picture.resize((80, 80))
    out = pipe.upscale(small, class_labels=3, seed=3)
    assert {key: out.settings[key] for key in ("task", "from", "keep_scales")} == {
        "task": "upscale",
        "from": "80x80",
        "keep_scales": 4,
    }
    edit = upscaling(small, pipe.manifest.plan, keep_scales=None, fit="exact", consistency=True)
    codes = drawn_codes(pipe, edit, seed=3)
    for index in (0, 2, 3):
        np.testing.assert_array_equal(*codes[index])
    image, drawn = codes[4]
    assert (image != drawn).mean() > 0.5


@pytest.mark.parametrize("count", [2, SCALES])
def test_where_codes_are_mixed_those_that_are_kept_are_not(modules, picture, count: int):
    pipe = modules(DENSE, smooth=True)
    executed = dict(enumerate((side, side) for side in CONFIG.scales))
    workspace = pipe._session.workspace(2)
    edit = upscaling(picture, pipe.manifest.plan, keep_scales=count, fit="exact", consistency=False)
    given = given_tokens(workspace.encode_image(edit.pixels), edit.kept, pipe.manifest, pipe.bundle.weights)
    workspace.give(LabelInput(3))
    for calls, _ in workspace.run_scales(
        given.noise(1, workspace.summed_before), SamplingSettings(3.0, None, TOP_P, TOP_K, 0.0)
    ):
        index = calls.step.index
        kept = {i: size for i, size in executed.items() if i <= index}
        own = quantised(picture, kept)[1][0]
        summed = torch.from_numpy(workspace.summed_codes(calls).copy())
        assert torch.allclose(summed, own, atol=1e-4) == (index < count), f"scale {index}"


def test_memory_is_what_drawing_takes(pipe: Pipeline):
    """The image encoder comes first and leaves nothing behind."""
    layouts = [pipe._session.workspace(rows).layout for rows in (1, 2)]
    assert all(layout.encoder is not None for layout in layouts)
    bare = replace(pipe.manifest, encoder="")
    for layout in layouts:
        assert build_layout(bare, layout.rows).arena_bytes == layout.arena_bytes


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({}, "no class label given"),
        ({"prompt": "a goldfish"}, "class_labels=.207.: var models draw from class labels"),
        ({"prompt": "a goldfish", "class_labels": 3}, "a prompt and class labels given: a prompt cannot be drawn from"),
        ({"class_labels": 10}, 'a whole number from 0 to 9, or "unconditional"'),
        ({"class_labels": 3, "negative_prompt": "fog"}, "read no negative prompt"),
    ],
    ids=str,
)
def test_what_an_edit_cannot_draw_from_is_told(pipe: Pipeline, picture, mask, asked: dict[str, Any], problem: str):
    small = picture.resize((64, 64))
    for draw in (lambda: pipe.inpaint(picture, mask, **asked), lambda: pipe.upscale(small, **asked)):
        with pytest.raises(InputError, match=problem):
            draw()


def test_an_image_of_another_aspect_ratio_is_refused_or_cropped(pipe: Pipeline, picture, mask):
    wide = picture.resize((192, SIDE))
    with pytest.raises(InputError, match="the image is 192x128, the bundle draws 128x128: another aspect ratio"):
        pipe.inpaint(wide, mask.resize((192, SIDE)), class_labels=3)
    out = pipe.inpaint(wide, mask.resize((192, SIDE)), class_labels=3, fit="crop")
    assert out.images[0].size == (SIDE, SIDE)
