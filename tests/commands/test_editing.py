"""`fastvar upscale` and `fastvar inpaint` from outside."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from fastvar.runtime.images.png import read_metadata

PROMPT = "a red circle above a blue square"


@pytest.fixture
def files(tmp_path):
    """Images and masks by name, in a folder beside the one that commands run in."""
    folder = tmp_path.parent / f"{tmp_path.name}-given"
    folder.mkdir()
    Image.effect_noise((64, 64), 60).save(folder / "small.png")
    Image.effect_noise((256, 256), 60).save(folder / "full.png")
    Image.effect_noise((64, 48), 60).save(folder / "wide.png")
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    (folder / "text.png").write_text("a red circle")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "full.png").read_bytes()[:5000])
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 10:30] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.new("L", (64, 64)).save(folder / "black.png")
    Image.new("L", (64, 64), 255).save(folder / "white.png")
    return folder


def test_upscale_writes_an_image_of_the_bundles_size(run, editing_bundle, files, tmp_path):
    code, out, err = run(
        "upscale", editing_bundle, files / "small.png", PROMPT, "--seed", 3, "-o", "a.png", "--timings"
    )
    assert (code, err) == (0, "")
    assert "wrote a.png (seed 3" in out
    assert Image.open(tmp_path / "a.png").size == (256, 256)
    told = read_metadata(tmp_path / "a.png")
    settings = json.loads(told["settings"])
    assert (told["prompt"], settings["task"], settings["from"]) == (PROMPT, "upscale", "64x64")
    assert (settings["keep_scales"], settings["consistency"]) == (3, True)


def test_upscale_options_reach_the_drawing(run, editing_bundle, files, tmp_path):
    options = ("--no-consistency", "--keep-scales", 2, "--fit", "crop", "--size", "256x256", "--cfg", 1, "-n", 2)
    assert run("upscale", editing_bundle, files / "wide.png", PROMPT, *options)[0] == 0
    first, _ = sorted(tmp_path.iterdir())
    settings = json.loads(read_metadata(first)["settings"])
    assert (settings["keep_scales"], settings["consistency"], settings["from"]) == (2, False, "48x48")


def test_inpaint_writes_an_image(run, editing_bundle, files, tmp_path):
    for options in ((), ("--no-composite",)):
        command = ("inpaint", editing_bundle, files / "full.png", PROMPT, "--mask", files / "mask.png", "--seed", 1)
        assert run(*command, *options)[0] == 0
    assert len(os.listdir(tmp_path)) == 2
    settings = [json.loads(read_metadata(path)["settings"]) for path in tmp_path.iterdir()]
    assert {s["composite"] for s in settings} == {True, False}
    assert {s["task"] for s in settings} == {"inpaint"}


BAD_UPSCALES = {
    "missing.png cannot be read": ("missing.png", PROMPT),
    "text.png cannot be read": ("text.png", PROMPT),
    "empty.png cannot be read": ("empty.png", PROMPT),
    "cut.png cannot be read": ("cut.png", PROMPT),
    "crop it to 48x48 pixels": ("wide.png", PROMPT),
    "fit 'pad' not understood": ("wide.png", PROMPT, "--fit", "pad"),
    "none is left to draw": ("full.png", PROMPT),
    "not even one token": ("tiny.png", PROMPT),
    "keep_scales 8 is out of range": ("small.png", PROMPT, "--keep-scales", 8),
    "but this bundle draws 256x256": ("small.png", PROMPT, "--size", "512x512"),
    "size 'large' not understood": ("small.png", PROMPT, "--size", "large"),
    "the prompt is empty": ("small.png", " "),
    "seed -1 is out of range": ("small.png", PROMPT, "--seed", -1),
    "num_images 0": ("small.png", PROMPT, "-n", 0),
    "a .png, .jpg, .jpeg or .webp file": ("small.png", PROMPT, "--out", "a.gif"),
}


@pytest.mark.parametrize("message", BAD_UPSCALES)
def test_bad_upscale_is_told_plainly_and_leaves_nothing(run, editing_bundle, files, tmp_path, message):
    image, *rest = BAD_UPSCALES[message]
    told_plainly(run("upscale", editing_bundle, files / image, *rest), message, tmp_path)


BAD_INPAINTS = {
    "missing.png cannot be read": ("full.png", "missing.png"),
    "cut.png cannot be read": ("full.png", "cut.png"),
    "the mask is 64x48, the image 256x256": ("full.png", "wide.png"),
    "it holds no white": ("full.png", "black.png"),
    "every token is to be redrawn": ("full.png", "white.png"),
    "the image is 64x48, the bundle draws 256x256": ("wide.png", "wide.png"),
}


@pytest.mark.parametrize("message", BAD_INPAINTS)
def test_bad_inpaint_is_told_plainly_and_leaves_nothing(run, editing_bundle, files, tmp_path, message):
    image, mask = BAD_INPAINTS[message]
    told_plainly(run("inpaint", editing_bundle, files / image, PROMPT, "--mask", files / mask), message, tmp_path)


def test_inpaint_needs_a_mask(run, editing_bundle, files):
    assert run("inpaint", editing_bundle, files / "full.png", PROMPT)[0] == 2


def test_bundle_without_encoder(run, tiny_bundle, files, tmp_path):
    told_plainly(run("upscale", tiny_bundle, files / "small.png", PROMPT), "--with-encoder", tmp_path)


def test_a_class_is_edited_by_label(run, var_editing_bundle, files, tmp_path):
    """By an option, or in the prompt's place; the mask is of the image's aspect ratio."""
    photo, mask = files / "full.png", files / "mask.png"
    shared = ("--mask", mask, "--seed", 1, "--top-k", 30)
    assert run("inpaint", var_editing_bundle, photo, "--class-label", 3, *shared, "-o", "a.png")[::2] == (0, "")
    assert run("inpaint", var_editing_bundle, photo, 3, *shared, "-o", "b.png")[::2] == (0, "")
    assert run("inpaint", var_editing_bundle, photo, "--class-label", 7, *shared, "-o", "c.png")[::2] == (0, "")
    images = [Image.open(tmp_path / f"{name}.png") for name in "abc"]
    assert images[0].tobytes() == images[1].tobytes() != images[2].tobytes()
    told = read_metadata(tmp_path / "a.png")
    settings = json.loads(told["settings"])
    assert (told["class label"], settings["task"], settings["top_k"]) == ("3", "inpaint", 30)


def test_a_class_is_upscaled_by_label(run, var_editing_bundle, files, tmp_path):
    small = files / "small.png"
    code, _, err = run("upscale", var_editing_bundle, small, "--class-label", "unconditional", "--seed", 1)
    assert (code, err) == (0, "")
    told = read_metadata(tmp_path / "unconditional-1.png")
    assert Image.open(tmp_path / "unconditional-1.png").size == (128, 128)
    settings = json.loads(told["settings"])
    assert (settings["keep_scales"], settings["guidance_scale"]) == (3, 0)


WRONG_SUBJECTS = {
    "neither a prompt nor --class-label given": (),
    "both a prompt and --class-label given": ("a goldfish", "--class-label", 3),
    "class '10' is out of range": ("--class-label", 10),
    "no class is named 'a goldfish'": ("a goldfish",),
}


@pytest.mark.parametrize("command", ["inpaint", "upscale"])
@pytest.mark.parametrize("message", WRONG_SUBJECTS)
def test_what_an_edit_shows_is_said_once(run, var_editing_bundle, files, tmp_path, command, message):
    image = "full.png" if command == "inpaint" else "small.png"
    more = ("--mask", files / "mask.png") if command == "inpaint" else ()
    result = run(command, var_editing_bundle, files / image, *WRONG_SUBJECTS[message], *more)
    told_plainly(result, message, tmp_path)


def test_a_model_of_prompts_reads_no_class(run, editing_bundle, files, tmp_path):
    result = run("upscale", editing_bundle, files / "small.png", "--class-label", 3)
    told_plainly(result, "class labels given", tmp_path)


def told_plainly(result, message, folder):
    code, out, err = result
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert list(folder.iterdir()) == []
