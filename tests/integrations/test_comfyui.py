"""The nodes for ComfyUI: their core against the pipeline, and the pack itself in a real ComfyUI where there is one."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvar import Pipeline
from fastvar.errors import FastvarError, InputError

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
SMALL = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
PHOTO = SMALL.resize((256, 256))
MASK = np.zeros((1, 256, 256), np.float32)
MASK[:, 64:192, 64:192] = 1
OWN = {"seed": 7}


def core() -> ModuleType:
    """The module of the pack that needs no ComfyUI."""
    spec = importlib.util.spec_from_file_location("fastvar_nodes_drawing", PACK / "drawing.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


drawing = core()


@pytest.fixture(scope="module")
def models(batched_bundle: Path, var_editing_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(batched_bundle, folder / "texts")
    shutil.copytree(var_editing_bundle, folder / "classes")
    (folder / "no bundle").mkdir()
    return folder


@pytest.fixture(scope="module")
def pipe(models: Path) -> Pipeline:
    return drawing.load("texts", [str(models)], threads=1)


def draw(pipe: Pipeline, prompt: str = "a red circle", count: int = 1, **more: Any) -> np.ndarray:
    given = {"chosen": OWN, "negative": "", "preview": lambda *_: None, "interrupt": lambda: None, **more}
    found = drawing.draw(pipe, prompt, count, **given)
    assert isinstance(found, np.ndarray)
    return found


def levels(images: np.ndarray) -> np.ndarray:
    return np.rint(images * 255).astype(np.uint8)


def array(image: Image.Image) -> np.ndarray:
    """As ComfyUI has it: [1, H, W, 3], from 0 to 1."""
    return np.asarray(image, np.float32)[None] / 255


def test_bundles_are_listed_by_name(models: Path):
    assert list(drawing.bundles([str(models)])) == ["classes", "texts"]
    assert drawing.bundle_named("texts", [str(models)]) == models / "texts"
    with pytest.raises(InputError, match=r"no bundle is named 'none'\nexpected: classes, texts"):
        drawing.load("none", [str(models)])


def test_a_bundle_stays_loaded_until_it_changes(models: Path, pipe: Pipeline):
    assert drawing.load("texts", [str(models)], threads=1) is pipe


def test_images_are_the_pipelines(pipe: Pipeline):
    found = draw(pipe, count=3, chosen=drawing.settings(7, 2.5, 0.8, -1), negative="blue")
    assert found.shape == (3, 256, 256, 3)
    assert found.dtype == np.float32
    own = pipe("a red circle", seed=7, num_images=3, guidance_scale=2.5, tau=0.8, negative_prompt="blue")
    assert np.array_equal(levels(found), np.stack([np.asarray(image) for image in own.images]))


def test_images_are_enlarged_and_redrawn(pipe: Pipeline):
    both = np.concatenate([array(SMALL), array(SMALL.transpose(Image.Transpose.ROTATE_90))])
    found = draw(pipe, image=both, keep_scales=1, fit="exact")
    own = [
        pipe.upscale(np.asarray(one), "a red circle", seed=7 + place, keep_scales=1).images[0]
        for place, one in enumerate(levels(both))
    ]
    assert np.array_equal(levels(found), np.stack([np.asarray(image) for image in own]))
    redrawn = draw(pipe, image=array(PHOTO), mask=MASK, fit="exact")
    own = [pipe.inpaint(PHOTO, MASK[0] > 0.5, "a red circle", seed=7).images[0]]
    assert np.array_equal(levels(redrawn), np.stack([np.asarray(image) for image in own]))
    assert np.array_equal(levels(redrawn)[0, :32, :32], np.asarray(PHOTO)[:32, :32])


def test_a_prompt_is_a_class_where_classes_are_drawn(models: Path):
    pipe = drawing.load("classes", [str(models)], threads=1)
    assert np.array_equal(levels(draw(pipe, "3"))[0], np.asarray(pipe(class_labels=3, seed=7).images[0]))


def test_every_scale_of_every_image_is_previewed(pipe: Pipeline):
    seen: list[tuple[int, int, tuple[int, int]]] = []
    draw(pipe, count=2, preview=lambda done, total, image: seen.append((done, total, image.size)))
    total = 2 * len(pipe.manifest.plan.steps)
    assert seen == [(done, total, (256, 256)) for done in range(1, total + 1)]


def test_interrupted_within_a_scale_it_draws_on_afterwards(pipe: Pipeline):
    calls = []

    def interrupt() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        draw(pipe, count=8, interrupt=interrupt)
    assert len(calls) == 2
    assert np.array_equal(levels(draw(pipe))[0], np.asarray(pipe("a red circle", seed=7).images[0]))


def test_what_cannot_be_drawn_is_told_in_words(pipe: Pipeline):
    with pytest.raises(FastvarError) as caught:
        draw(pipe, "a " * 100)
    assert "tokens" in str(drawing.in_words(caught.value))
    with pytest.raises(FastvarError, match="the mask marks nothing"):
        draw(pipe, image=array(PHOTO), mask=np.zeros_like(MASK))


def nodes() -> dict[str, set[str]]:
    """Inputs by node, as the pack's source names them."""
    text = (PACK / "__init__.py").read_text(encoding="utf-8")
    shared = set(re.findall(r'Input\(\s*"(\w+)"', text[text.index("def _shared") : text.index("def _draw")]))
    shared.add("pipeline")
    found = {}
    for block in re.split(r"\nclass ", text)[1:]:
        if name := re.search(r'node_id="(\w+)"', block):
            own = set(re.findall(r'Input\(\s*"(\w+)"', block))
            found[name[1]] = own | (shared if "_shared(" in block else set())
    return found


@pytest.mark.parametrize("file", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda file: file.stem)
def test_example_workflows_name_nodes_and_inputs_that_are_there(file: Path):
    known = nodes()
    assert len(known) == 4
    for node in json.loads(file.read_text()).values():
        if node["class_type"].startswith("Fastvar"):
            assert set(node["inputs"]) <= known[node["class_type"]]
