"""The pack in a real ComfyUI, over HTTP and its websocket: set COMFYUI_DIR, and COMFYUI_PYTHON where it has its own."""

from __future__ import annotations

import copy
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvar import Pipeline

from . import stand_in
from .conftest import photo
from .process import NODES, ComfyUI, Refused, Run, needs_comfyui
from .workflows import FILES, Prompt, as_prompt, workflow

pytestmark = needs_comfyui
LOAD, DRAW = "1", "2"  # ids of generate.json
EDIT, SMALLER = "3", "6"  # of the others
RED, GREEN = (f"a large red circle above a small {color} square on a white background" for color in ("blue", "green"))
MANY = 64  # images that are interrupted long before they are done


@pytest.fixture(scope="module")
def scales(bundles: dict[str, Path]) -> int:
    with Pipeline.load(bundles["demo"], threads=1) as pipe:
        return len(pipe.manifest.plan.steps)


def given(infos: dict[str, Any], name: str, **inputs: Any) -> Prompt:
    """An example workflow with other values of the node that draws; `bundle` is the other node's, `file` the image.
    What makes that image small is left out.
    """
    prompt = as_prompt(workflow(name), infos)
    if name == "upscale":
        prompt[EDIT]["inputs"]["image"] = prompt.pop(SMALLER)["inputs"]["image"]
    bundle, file = inputs.pop("bundle", None), inputs.pop("file", None)
    for node in prompt.values():
        kind = node["class_type"]
        if kind == "FastvarLoadBundle" and bundle:
            node["inputs"]["bundle"] = bundle
        elif kind == "LoadImage" and file:
            node["inputs"]["image"] = file
        elif kind.startswith("Fastvar") and kind != "FastvarLoadBundle":
            node["inputs"].update(inputs)
    return prompt


def equal(images: list[Image.Image], own: list[np.ndarray]) -> bool:
    return len(images) == len(own) and all(
        np.array_equal(np.asarray(one), other) for one, other in zip(images, own, strict=True)
    )


# What ComfyUI knows of the pack


def test_comfyui_tells_of_the_nodes_what_they_say(server: ComfyUI, infos: dict[str, Any]):
    found = {name: info for name, info in infos.items() if info["python_module"] == f"custom_nodes.{NODES}"}
    with stand_in.loaded(server.base / "models") as (pack, _):
        own = {cls.info()["name"]: cls.info() for cls in (pack.LoadBundle, pack.Generate, pack.Upscale, pack.InPaint)}
    assert sorted(found) == sorted(own)
    for name, said in own.items():
        kept = {key: found[name][key] for key in said}
        assert kept == said
        assert list(kept["input"]["required"]) == list(said["input"]["required"])


def test_example_workflows_are_among_comfyuis_templates(server: ComfyUI):
    assert sorted(server.get("/workflow_templates")[NODES]) == [file.stem for file in FILES]
    for file in FILES:
        assert server.get(f"/api/workflow_templates/{NODES}/{file.name}") == json.loads(file.read_text())


def test_a_bundle_that_comes_is_listed_without_a_restart(server: ComfyUI):
    def listed() -> list[str]:
        return list(
            server.get("/object_info/FastvarLoadBundle")["FastvarLoadBundle"]["input"]["required"]["bundle"][1][
                "options"
            ]
        )

    assert listed() == ["classes", "demo", "plain"]
    (server.models / "later").symlink_to(server.models / "demo")
    assert listed() == ["classes", "demo", "later", "plain"]
    (server.models / "later").unlink()


# What it draws


def test_images_are_the_pipelines_and_every_scale_is_previewed(server: ComfyUI, infos: dict[str, Any], scales: int):
    prompt = given(infos, "generate", seed=11)
    count = prompt[DRAW]["inputs"]["images"]
    run = server.run(prompt)
    assert equal(run.images, server.drawn("demo", prompt=RED, seed=11, num_images=count))
    total = scales * count
    assert [(value, most) for value, most, node in run.progress if node == DRAW] == [
        (done, total) for done in range(1, total + 1)
    ]
    assert len(run.previews) == total
    assert {image.size for _, image in run.previews} == {(512, 512)}  # --preview-size, to which ComfyUI resizes
    assert json.loads(run.images[0].info["prompt"])[DRAW] == prompt[DRAW]


def test_previews_say_of_which_node_they_are(server: ComfyUI, infos: dict[str, Any], scales: int):
    run = server.run(given(infos, "generate", seed=12, images=1), metadata=True)
    assert [said["node_id"] for said, _ in run.previews] == [DRAW] * scales


def test_the_same_again_is_not_drawn_again(server: ComfyUI, infos: dict[str, Any]):
    first = server.run(given(infos, "generate", seed=13, images=1))
    again = server.run(given(infos, "generate", seed=13, images=1))
    assert again.cached >= {LOAD, DRAW}
    assert again.progress == []
    other = server.run(given(infos, "generate", seed=14, images=1))
    assert other.cached == {LOAD}
    assert equal(other.images, server.drawn("demo", prompt=RED, seed=14))
    assert not equal(other.images, [np.asarray(first.images[0])])


def test_settings_are_the_bundles_own_or_those_given(server: ComfyUI, infos: dict[str, Any]):
    run = server.run(given(infos, "generate", seed=15, images=1, guidance=2.5, tau=0.7, top_p=0.9, negative="blue"))
    own = {"guidance_scale": 2.5, "tau": 0.7, "top_p": 0.9, "negative_prompt": "blue"}
    assert equal(run.images, server.drawn("demo", prompt=RED, seed=15, **own))
    assert (DRAW, "seed 15, guidance 2.5, tau 0.7, top_p 0.9") in run.words
    plain = server.run(given(infos, "generate", seed=15, images=2))
    assert any(node == DRAW and line.startswith("seeds 15 to 16, guidance ") for node, line in plain.words)


def test_classes_are_drawn_by_number(server: ComfyUI, infos: dict[str, Any]):
    run = server.run(given(infos, "generate", bundle="classes", prompt="3", images=2, seed=16))
    assert equal(run.images, server.drawn("classes", class_labels="3", seed=16, num_images=2))
    assert any(node == LOAD and "of class labels" in line for node, line in run.words)


def test_an_image_is_enlarged(server: ComfyUI, infos: dict[str, Any], scales: int):
    small = server.base / "input" / "small.png"
    photo(96, 64).save(small)
    run = server.run(given(infos, "upscale", file="small.png", seed=17))
    assert equal(run.images, server.drawn("demo", "upscale", image=str(small), prompt=RED, seed=17, fit="crop"))
    kept = server.run(given(infos, "upscale", file="small.png", seed=17, keep_scales=2))
    own = {"image": str(small), "prompt": RED, "seed": 17, "fit": "crop", "keep_scales": 2}
    assert equal(kept.images, server.drawn("demo", "upscale", **own))
    assert not equal(kept.images, [np.asarray(run.images[0])])
    assert 0 < len(run.previews) <= scales


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example_workflows_run_as_they_are(server: ComfyUI, infos: dict[str, Any], file: Path):
    run = server.run(as_prompt(workflow(file.stem), infos))
    assert {image.size for image in run.images} == {(256, 256)}
    assert "Upscale" in infos["ImageScale"]["display_name"]  # as a workflow's note calls it


def test_a_part_is_drawn_anew(server: ComfyUI, infos: dict[str, Any]):
    holed = server.base / "input" / "holed.png"
    photo(hole=True).save(holed)
    run = server.run(given(infos, "inpaint", file="holed.png", seed=18))
    whole = server.base / "temp" / "whole.png"
    photo().save(whole)
    own = {"image": str(whole), "mask": str(holed), "prompt": GREEN, "seed": 18}
    assert equal(run.images, server.drawn("demo", "inpaint", **own))
    assert np.array_equal(np.asarray(run.images[0])[:32], np.asarray(photo())[:32])


def test_a_batch_is_enlarged_image_by_image(server: ComfyUI, infos: dict[str, Any]):
    files = [server.base / "input" / f"batch-{place}.png" for place in range(2)]
    for place, file in enumerate(files):
        photo(64, 64, turned=bool(place)).save(file)
    prompt = given(infos, "upscale", file=files[0].name, seed=19)
    prompt["20"] = {"class_type": "LoadImage", "inputs": {"image": files[1].name}}
    prompt["21"] = {
        "class_type": "ImageBatch",
        "inputs": {"image1": prompt[EDIT]["inputs"]["image"], "image2": ["20", 0]},
    }
    prompt[EDIT]["inputs"]["image"] = ["21", 0]
    run = server.run(prompt)
    own = [
        server.drawn("demo", "upscale", image=str(file), prompt=RED, seed=19 + place)[0]
        for place, file in enumerate(files)
    ]
    assert equal(run.images, own)


# What ends before its time, and what cannot be drawn


def test_interrupted_within_a_scale_it_draws_on_afterwards(server: ComfyUI, infos: dict[str, Any], scales: int):
    stopped: list[int] = []

    def stop(run: Run) -> None:
        if len(run.previews) == 2 * scales and not stopped:
            server.post("/interrupt")
            stopped.append(len(run.previews))

    run = server.run(given(infos, "generate", seed=20, images=MANY), on_message=stop)
    assert run.end == "execution_interrupted"
    assert [data["node_id"] for data in run.told("execution_interrupted")] == [DRAW]
    assert run.images == []
    assert len(run.previews) < scales * MANY / 2
    after = server.run(given(infos, "generate", seed=20, images=1))
    assert equal(after.images, server.drawn("demo", prompt=RED, seed=20))
    assert LOAD in after.cached


def refused(server: ComfyUI, prompt: Prompt) -> dict[str, list[str]]:
    with pytest.raises(Refused) as caught:
        server.run(prompt)
    return caught.value.details


def test_an_unknown_bundle_is_refused_before_anything_runs(server: ComfyUI, infos: dict[str, Any]):
    told = refused(server, given(infos, "generate", bundle="none"))
    (line,) = told[LOAD]
    assert "no bundle is named 'none'\nexpected: classes, demo, plain\nfix: choose one of them" in line


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"fit": "stretch"}, "fit 'stretch' is unknown\nexpected: crop or exact"),
        ({"guidance": 101}, "Value 101.0 bigger than max of 100: guidance"),
        ({"seed": -1}, "Value -1 smaller than min of 0: seed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_inputs_are_checked_before_anything_runs(
    server: ComfyUI, infos: dict[str, Any], inputs: dict[str, Any], words: str
):
    (line,) = refused(server, given(infos, "upscale", **inputs))[EDIT]
    assert words in line


WRONG = {
    "another shape": ("upscale", {"file": "wide.png", "fit": "exact"}, r"expected: .*1:1|square|aspect"),
    "no mask": ("inpaint", {"file": "wide.png"}, "the mask is empty\nexpected: 1 where .*\nfix: .*MaskEditor"),
    "a long prompt": ("generate", {"prompt": "a red " * 99}, "tokens"),
    "guidance": ("generate", {"guidance": -0.5}, "guidance_scale -0.5 is out of range\nexpected: a number from 0"),
    "tau": ("generate", {"tau": 0}, "tau 0.0 is out of range"),
    "no encoder": ("upscale", {"bundle": "plain", "file": "wide.png"}, "--with-encoder"),
    "no class": ("generate", {"bundle": "classes", "prompt": "a red circle"}, "no class is named 'a red circle'"),
    "class range": ("generate", {"bundle": "classes", "prompt": "4000"}, "class '4000' is out of range"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_drawn_is_told_in_words(server: ComfyUI, infos: dict[str, Any], case: str):
    name, inputs, words = WRONG[case]
    photo(128, 64).save(server.base / "input" / "wide.png")
    run = server.run(given(infos, name, **inputs))
    assert run.end == "execution_error"
    (data,) = run.told("execution_error")
    assert data["node_type"].startswith("Fastvar")
    assert data["exception_type"].startswith("fastvar.errors.")
    assert "Traceback" not in run.error
    assert "/nodes.py" in data["traceback"][-1]  # not where in fastvar it was found
    assert re.search(words, run.error), run.error
    assert server.run(given(infos, "generate", seed=21, images=1)).end == "execution_success"


def test_unknown_words_are_told_on_the_node(server: ComfyUI, infos: dict[str, Any]):
    run = server.run(given(infos, "generate", prompt="a red zeppelin", seed=22, images=1))
    unknown = "the tokenizer does not know: 'zeppelin' (prompt); the image cannot follow them"
    first, last = (line for node, line in run.words if node == DRAW)
    assert first == unknown
    assert last.startswith(f"{unknown}\nseed 22, guidance ")


# How long a bundle stays


def test_a_bundle_that_was_built_anew_is_loaded_anew(server: ComfyUI, infos: dict[str, Any]):
    prompt = given(infos, "generate", seed=23, images=1)
    server.run(prompt)
    manifest = server.models / "demo" / "manifest.json"
    later = time.time() + 10
    os.utime(manifest, (later, later))
    run = server.run(copy.deepcopy(prompt))
    assert LOAD not in run.cached
    assert DRAW not in run.cached


def test_free_memory_unloads_the_bundle(server: ComfyUI, infos: dict[str, Any]):
    prompt = given(infos, "generate", seed=24, images=1)
    server.run(prompt)
    server.post("/free", {"unload_models": True, "free_memory": True})
    end = time.monotonic() + 60
    while LOAD in server.run(copy.deepcopy(prompt)).cached:  # freed when the queue has been looked at
        assert time.monotonic() < end
        time.sleep(1)
