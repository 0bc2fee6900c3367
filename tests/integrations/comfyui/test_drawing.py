"""What the nodes do, without ComfyUI, against the pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvar import Pipeline
from fastvar.errors import DeviceMemoryError, FastvarError, InputError

from . import stand_in

SMALL = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
PHOTO = SMALL.resize((256, 256))
MASK = np.zeros((1, 256, 256), np.float32)
MASK[:, 64:192, 64:192] = 1
OWN = {"seed": 7}


@pytest.fixture(scope="module")
def models(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("demo", "classes"):
        shutil.copytree(bundles[name], folder / name)
    (folder / "no bundle").mkdir()
    return folder


@pytest.fixture(scope="module")
def pack(models: Path) -> Iterator[ModuleType]:
    with stand_in.loaded(models) as (found, _):
        yield found.nodes


@pytest.fixture(scope="module")
def pipe(pack: ModuleType, models: Path) -> Pipeline:
    found = pack.bundles.load("demo", [str(models)])
    assert isinstance(found, Pipeline)
    return found


def draw(pack: ModuleType, pipe: Pipeline, prompt: str = "a red circle", count: int = 1, **more: Any) -> np.ndarray:
    given = {"chosen": OWN, "negative": "", "preview": lambda *_: None, "interrupt": lambda: None}
    given |= {"warned": lambda line: None, "told": lambda line: None, **more}
    found = pack.drawing.draw(pipe, prompt, count, **given)
    assert isinstance(found, np.ndarray)
    return found


def levels(images: np.ndarray) -> np.ndarray:
    return np.rint(images * 255).astype(np.uint8)


def array(image: Image.Image) -> np.ndarray:
    """As ComfyUI has it: [1, H, W, 3], from 0 to 1."""
    return np.asarray(image, np.float32)[None] / 255


def own(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_bundles_are_listed_by_name(pack: ModuleType, models: Path):
    assert list(pack.bundles.bundles([str(models)])) == ["classes", "demo"]
    assert pack.bundles.bundle_named("demo", [str(models)]) == models / "demo"
    with pytest.raises(InputError, match=r"no bundle is named 'none'\nexpected: classes, demo\nfix: choose"):
        pack.bundles.load("none", [str(models)])
    with pytest.raises(InputError, match=r"there is no bundle yet\nexpected: a folder made by `fastvar build` in /x"):
        pack.bundles.load(pack.bundles.NO_BUNDLE, ["/x"])


def test_a_bundle_stays_loaded_while_somebody_holds_it(pack: ModuleType, models: Path, pipe: Pipeline):
    folders = [str(models)]
    assert pack.bundles.load("demo", folders) is pipe
    other = pack.bundles.load("classes", folders)
    assert len(pack.bundles._loaded) == 2
    del other
    assert pack.bundles.load("demo", folders, "9GiB") is not pipe
    assert [key[0].name for key in pack.bundles._loaded] == ["demo"]


def test_room_is_made_once_where_memory_is_short(pack: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch):
    loads, rooms = [], []

    def load(path: Path, **options: Any) -> object:
        loads.append(options)
        if len(rooms) < needed:
            raise DeviceMemoryError("too little")
        return pack.bundles.Path  # anything that can be held weakly

    monkeypatch.setattr(pack.bundles.Pipeline, "load", load)
    needed = 1
    pack.bundles.load("demo", [str(models)], " 1GiB ", lambda: rooms.append(1))
    assert loads == [{"threads": None, "memory_budget": "1GiB"}] * 2
    needed = 9
    with pytest.raises(DeviceMemoryError):
        pack.bundles.load("demo", [str(models)], "2GiB", lambda: rooms.append(1))
    assert len(loads) == 4
    assert len(rooms) == 2


def test_threads_are_those_that_the_process_was_started_with(pack: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASTVAR_THREADS", "3")
    assert pack.bundles.threads() == 3
    monkeypatch.setenv("FASTVAR_THREADS", " ")
    assert pack.bundles.threads() is None
    monkeypatch.setenv("FASTVAR_THREADS", "many")
    with pytest.raises(InputError, match="FASTVAR_THREADS is 'many'\nexpected: a number of CPU threads"):
        pack.bundles.threads()


def test_a_bundle_is_told_in_a_line(pack: ModuleType, models: Path, pipe: Pipeline):
    scales = len(pipe.manifest.plan.steps)
    told = pack.bundles.described(pipe)
    assert told == f"infinity: 256x256 of prompts, {scales} scales; enlarges and in-paints"
    assert "of class labels" in pack.bundles.described(pack.bundles.load("classes", [str(models)]))


def test_images_are_the_pipelines(pack: ModuleType, pipe: Pipeline):
    chosen = pack.drawing.settings(7, 2.5, 0.8, -1)
    found = draw(pack, pipe, count=3, chosen=chosen, negative="blue")
    assert found.shape == (3, 256, 256, 3)
    assert found.dtype == np.float32
    drawn = pipe("a red circle", seed=7, num_images=3, guidance_scale=2.5, tau=0.8, negative_prompt="blue")
    assert np.array_equal(levels(found), own(drawn.images))


def test_images_are_enlarged_and_redrawn(pack: ModuleType, pipe: Pipeline):
    both = np.concatenate([array(SMALL), array(SMALL.transpose(Image.Transpose.ROTATE_90))])
    found = draw(pack, pipe, image=both, keep_scales=1, fit="exact")
    drawn = [
        pipe.upscale(np.asarray(one), "a red circle", seed=7 + place, keep_scales=1).images[0]
        for place, one in enumerate(levels(both))
    ]
    assert np.array_equal(levels(found), own(drawn))
    redrawn = draw(pack, pipe, image=array(PHOTO), mask=MASK, fit="exact")
    assert np.array_equal(levels(redrawn), own(pipe.inpaint(PHOTO, MASK[0] > 0.5, "a red circle", seed=7).images))
    assert np.array_equal(levels(redrawn)[0, :32, :32], np.asarray(PHOTO)[:32, :32])


def test_masks_are_one_for_all_images_or_one_for_each(pack: ModuleType, pipe: Pipeline):
    images = np.concatenate([array(PHOTO)] * 2)
    other = np.roll(MASK, 32, axis=1)
    each = draw(pack, pipe, image=images, mask=np.concatenate([MASK, other]))
    same = draw(pack, pipe, image=images, mask=MASK)
    assert np.array_equal(each[0], same[0])
    assert np.array_equal(draw(pack, pipe, image=images, mask=MASK[0]), same)
    assert np.array_equal(levels(same[1]), own(pipe.inpaint(PHOTO, MASK[0] > 0.5, "a red circle", seed=8).images)[0])
    assert np.array_equal(levels(each[1]), own(pipe.inpaint(PHOTO, other[0] > 0.5, "a red circle", seed=8).images)[0])
    with pytest.raises(InputError, match=r"3 masks for 2 images\nexpected: one for all, or one for each"):
        draw(pack, pipe, image=images, mask=np.concatenate([MASK] * 3))


def test_a_prompt_is_a_class_where_classes_are_drawn(pack: ModuleType, models: Path):
    pipe = pack.bundles.load("classes", [str(models)])
    assert np.array_equal(levels(draw(pack, pipe, "3")), own(pipe(class_labels=3, seed=7).images))


def test_every_scale_of_every_image_is_previewed(pack: ModuleType, pipe: Pipeline):
    seen: list[tuple[int, int, tuple[int, int]]] = []
    draw(pack, pipe, count=2, preview=lambda done, total, image: seen.append((done, total, image.size)))
    total = 2 * len(pipe.manifest.plan.steps)
    assert seen == [(done, total, (256, 256)) for done in range(1, total + 1)]


def test_interrupted_within_a_scale_it_draws_on_afterwards(pack: ModuleType, pipe: Pipeline):
    calls = []

    def interrupt() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        draw(pack, pipe, count=8, interrupt=interrupt)
    assert len(calls) == 2
    assert np.array_equal(levels(draw(pack, pipe)), own(pipe("a red circle", seed=7).images))


def test_the_user_is_told_of_seeds_settings_and_unknown_words(pack: ModuleType, pipe: Pipeline):
    warned: list[str] = []
    told: list[str] = []
    draw(pack, pipe, "a red zeppelin", count=2, warned=warned.append, told=told.append)
    assert warned == ["the tokenizer does not know: 'zeppelin' (prompt); the image cannot follow them"]
    settings = pipe("a red circle", seed=7).settings
    guidance, tau, top_p = (settings[name] for name in ("guidance_scale", "tau", "top_p"))
    assert told == [f"seeds 7 to 8, guidance {guidance:g}, tau {tau:g}, top_p {top_p:g}"]


def test_what_cannot_be_drawn_is_told_in_words(pack: ModuleType, pipe: Pipeline):
    with pytest.raises(FastvarError, match="tokens"):
        draw(pack, pipe, "a " * 100)
    with pytest.raises(InputError, match=r"the mask is empty\nexpected: 1 where .*\nfix: .* MaskEditor"):
        draw(pack, pipe, image=array(PHOTO), mask=np.zeros_like(MASK))
    with pytest.raises(InputError, match="mask 2 of 2 is empty"):
        draw(pack, pipe, image=np.concatenate([array(PHOTO)] * 2), mask=np.concatenate([MASK, 0 * MASK]))
    with pytest.raises(InputError, match=r"guidance_scale -0\.5 is out of range"):
        draw(pack, pipe, chosen=pack.drawing.settings(7, -0.5, -1, -1))
