"""The nodes with a stand-in for ComfyUI: their inputs, what they hand on; example workflows; the registry's rules."""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar import Pipeline
from fastvar.errors import InputError

from . import stand_in
from .workflows import FILES, PACK, Info, as_prompt, inputs_of, workflow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Nodes of ComfyUI itself that the example workflows use, as far as workflows depend on it.
CORE: dict[str, Info] = {
    "LoadImage": {"input": {"required": {"image": [["example.png"], {"image_upload": True}]}}},
    "ImageScale": {
        "input": {
            "required": {
                "image": ["IMAGE"],
                "upscale_method": [["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]],
                "width": ["INT", {"min": 0, "max": 16384}],
                "height": ["INT", {"min": 0, "max": 16384}],
                "crop": [["disabled", "center"]],
            }
        }
    },
    "SaveImage": {"input": {"required": {"images": ["IMAGE"], "filename_prefix": ["STRING", {"default": "ComfyUI"}]}}},
}


@pytest.fixture
def comfy(bundles: dict[str, Path], tmp_path: Path) -> Iterator[tuple[ModuleType, stand_in.Comfy]]:
    folder = tmp_path / "fastvar"
    folder.mkdir()
    (folder / "demo").symlink_to(bundles["demo"])
    with stand_in.loaded(tmp_path) as found:
        yield found


@pytest.fixture
def pack(comfy: tuple[ModuleType, stand_in.Comfy]) -> ModuleType:
    return comfy[0]


def infos(pack: ModuleType) -> dict[str, Info]:
    found = (cls.info() for cls in (pack.LoadBundle, pack.Generate, pack.Upscale, pack.InPaint))
    return {info["name"]: info for info in found}


def test_the_pack_gives_its_nodes(pack: ModuleType):
    coroutine = pack.comfy_entrypoint()
    with pytest.raises(StopIteration) as extension:
        coroutine.send(None)
    with pytest.raises(StopIteration) as nodes:
        extension.value.value.get_node_list().send(None)
    assert nodes.value.value == [pack.LoadBundle, pack.Generate, pack.Upscale, pack.InPaint]


def test_without_fastvar_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    imported = builtins.__import__

    def none(name: str, *rest: Any) -> Any:
        if name == "fastvar":
            raise ModuleNotFoundError("No module named 'fastvar'", name="fastvar")
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", none)
    with pytest.raises(ModuleNotFoundError, match=r'need fastvar .* pip install "fastvar-runtime\[onnxruntime\]"'):
        stand_in.loaded(tmp_path).__enter__()


def test_every_node_input_and_output_says_what_it_is(pack: ModuleType):
    for info in infos(pack).values():
        assert info["description"].endswith(".")
        assert info["category"] == "fastvar"
        assert info["display_name"].endswith(" (fastvar)")
        for name, (_, options) in inputs_of(info).items():
            assert options["tooltip"].endswith("."), name
        assert all(told.endswith(".") for told in info["output_tooltips"])


def test_what_may_be_left_away_has_a_default_that_is_in_range(pack: ModuleType):
    for info in infos(pack).values():
        for name, (kind, options) in info["input"].get("optional", {}).items():
            assert "default" in options, name
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"]


def test_bundles_are_offered_and_checked(comfy: tuple[ModuleType, stand_in.Comfy]):
    pack, there = comfy
    bundle = inputs_of(pack.LoadBundle.info())["bundle"][1]
    assert bundle["options"] == ["demo"]
    assert pack.LoadBundle.validate_inputs("demo") is True
    assert pack.LoadBundle.validate_inputs(None) is True
    assert pack.LoadBundle.validate_inputs("none").startswith("no bundle is named 'none'\nexpected: demo")
    (there.models / "fastvar" / "demo").unlink()
    assert inputs_of(pack.LoadBundle.info())["bundle"][1]["options"] == ["(no bundle in models/fastvar)"]
    assert pack.LoadBundle.validate_inputs("demo").startswith("no bundle is named 'demo'\nexpected: a folder made by")


def test_what_is_chosen_of_a_list_is_checked(pack: ModuleType):
    for cls in (pack.Upscale, pack.InPaint):
        assert [cls.validate_inputs(fit) for fit in ("crop", "exact", None)] == [True] * 3
        assert cls.validate_inputs("stretch") == "fit 'stretch' is unknown\nexpected: crop or exact"


def test_a_bundle_that_was_built_anew_has_another_fingerprint(pack: ModuleType, bundles: dict[str, Path]):
    changed = (bundles["demo"] / "manifest.json").stat().st_mtime_ns
    assert pack.LoadBundle.fingerprint_inputs("demo", memory="") == ("demo", changed)
    assert pack.LoadBundle.fingerprint_inputs("none") == ("none", 0)


def loaded(pack: ModuleType) -> Pipeline:
    (found,) = pack.LoadBundle.execute("demo").args
    assert isinstance(found, Pipeline)
    return found


def test_a_node_draws_with_bar_previews_and_words(comfy: tuple[ModuleType, stand_in.Comfy]):
    pack, there = comfy
    pipe = loaded(pack)
    assert there.lines == [("7", pack.nodes.bundles.described(pipe))]
    (images,) = pack.Generate.execute(pipe, "a red circle", 3, images=2, guidance=2.0).args
    own = pipe("a red circle", seed=3, num_images=2, guidance_scale=2.0)
    assert images.dtype == torch.float32
    assert np.array_equal(np.rint(images.numpy() * 255), np.stack([np.asarray(one) for one in own.images]))
    total = 2 * len(pipe.manifest.plan.steps)
    assert [(done, most, preview[0], preview[2]) for done, most, preview in there.bars] == [
        (done, total, "JPEG", 384) for done in range(1, total + 1)
    ]
    asked = pipe.requests.generation("a red circle", seed=3, num_images=2, guidance_scale=2.0)
    assert there.lines[-1] == ("7", pack.nodes.drawing.summary(asked))


def test_images_and_masks_come_as_tensors(comfy: tuple[ModuleType, stand_in.Comfy]):
    pack, _ = comfy
    pipe = loaded(pack)
    grey = torch.linspace(0, 1, 256).repeat(1, 256, 1)[..., None].repeat(1, 1, 1, 3)
    mask = torch.zeros(1, 256, 256)
    mask[:, 64:192, 64:192] = 1
    (painted,) = pack.InPaint.execute(grey, mask, pipe, "a red circle", 3).args
    assert torch.allclose(painted[:, :32], grey[:, :32], atol=1 / 255)
    (enlarged,) = pack.Upscale.execute(grey[:, :48, :64], pipe, "a red circle", 3, keep_scales=2).args
    assert enlarged.shape == (1, 256, 256, 3)
    with pytest.raises(InputError, match="64x48"):
        pack.Upscale.execute(grey[:, :48, :64], pipe, "a red circle", 3, fit="exact")


def test_interrupt_ends_a_drawing_and_room_is_asked_of_comfyui(comfy: tuple[ModuleType, stand_in.Comfy]):
    pack, there = comfy
    pipe = loaded(pack)
    there.interrupted_after = 3
    with pytest.raises(stand_in.Interrupted):
        pack.Generate.execute(pipe, "a red circle", 3, images=8)
    assert len(there.bars) == 3
    pack.nodes._make_room()
    assert there.room_made == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example_workflows_give_every_input(pack: ModuleType, file: Path):
    known = infos(pack) | CORE
    prompt = as_prompt(workflow(file.stem), known)
    drawing = [node for node in prompt.values() if node["class_type"] != "FastvarLoadBundle"]
    assert {node["class_type"] for node in prompt.values()} <= known.keys()
    assert len(drawing) >= 2
    for node in prompt.values():
        for name, value in node["inputs"].items():
            kind, options = (*inputs_of(known[node["class_type"]])[name], {})[:2]
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]
            elif kind == "COMBO" or isinstance(kind, list):
                assert value in (kind if isinstance(kind, list) else options["options"])
            elif kind != "STRING":
                assert isinstance(value, list)  # a link


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_links_of_example_workflows_go_both_ways(file: Path):
    graph = workflow(file.stem)
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert max(nodes) == graph["last_node_id"]
    assert max(link[0] for link in graph["links"]) == graph["last_link_id"]
    for number, source, out, target, into, kind in graph["links"]:
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][into]["link"] == number
        assert nodes[source]["outputs"][out]["type"] == nodes[target]["inputs"][into]["type"] == kind


def test_the_registry_takes_the_pack():
    read = tomllib.loads((PACK / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = read["project"], read["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z](?:[-_.]?[A-Za-z0-9])*", project["name"])
    assert len(project["name"]) < 100
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert set(project["license"]) <= {"file", "text"}
    assert project["urls"]["Repository"].startswith("https://")
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    package = tomllib.loads((PACK.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == package["requires-python"]
    (dependency,) = project["dependencies"]
    assert dependency == f"{package['name']}[onnxruntime]"
    assert (PACK / "requirements.txt").read_text(encoding="utf-8") == f"{dependency}\n"
    accelerators = {name for name in project["classifiers"] if name.startswith("Environment :: ")}
    assert accelerators <= set(package["classifiers"])
    for file in FILES:
        with Image.open(file.with_suffix(".jpg")) as thumbnail:
            assert thumbnail.format == "JPEG"
