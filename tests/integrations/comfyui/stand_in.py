"""The pack without ComfyUI: what it imports of it stands in, so that its nodes are tried where there is none.

`test_in_comfyui.py` compares what nodes tell of themselves here with what a real ComfyUI says of them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .workflows import PACK, Info

NAME = "fastvar_nodes"
OPTIONS = {"dynamic_prompts": "dynamicPrompts", "force_input": "forceInput"}  # as the page calls them
UNSAID = {"COMBO": {"multiselect": False}, "STRING": {"multiline": False}}  # what ComfyUI adds


class Interrupted(Exception):  # noqa: N818  as ComfyUI's InterruptProcessingException it is no error
    """What ComfyUI raises where the user has had enough."""


@dataclass
class Comfy:
    """What the pack has done with ComfyUI, and what that says to it."""

    models: Path
    bars: list[tuple[int, int, Any]] = field(default_factory=list)  # (value, total, preview) of every update
    lines: list[tuple[str, str]] = field(default_factory=list)  # (node, line) shown on nodes
    room_made: int = 0
    interrupted_after: int | None = None  # updates


class _Node:
    """io.ComfyNode: what a node tells of itself."""

    @classmethod
    def info(cls) -> Info:
        schema = cls.define_schema()  # type: ignore[attr-defined]  # of the pack's nodes
        groups: dict[str, dict[str, Any]] = {"required": {}}
        for name, kind, options in schema.inputs:
            group = "optional" if options.get("optional") else "required"
            said = {OPTIONS.get(key, key): value for key, value in options.items() if key != "optional"}
            groups.setdefault(group, {})[name] = [kind, {**UNSAID.get(kind, {}), **said}]
        return {
            "input": groups,
            "output": [kind for kind, _ in schema.outputs],
            "output_name": [options["display_name"] for _, options in schema.outputs],
            "output_tooltips": [options["tooltip"] for _, options in schema.outputs],
            "name": schema.node_id,
            "display_name": schema.display_name,
            "description": schema.description,
            "category": schema.category,
        }


def _typed(kind: str) -> SimpleNamespace:
    return SimpleNamespace(
        Input=lambda name, **options: (name, kind, options), Output=lambda **options: (kind, options)
    )


class _Output:
    def __init__(self, *values: Any) -> None:
        self.args = values


def modules(comfy: Comfy) -> dict[str, ModuleType]:
    """The modules that the pack imports."""
    kinds = {name: _typed(name.upper()) for name in ("Int", "Float", "String", "Combo", "Image", "Mask")}
    io = SimpleNamespace(ComfyNode=_Node, Schema=SimpleNamespace, NodeOutput=_Output, Custom=_typed, **kinds)

    def stop() -> None:
        if comfy.interrupted_after is not None and len(comfy.bars) >= comfy.interrupted_after:
            raise Interrupted

    def room() -> None:
        comfy.room_made += 1

    bar = SimpleNamespace(update_absolute=lambda done, total, preview: comfy.bars.append((done, total, preview)))
    server = SimpleNamespace(
        client_id="someone", send_progress_text=lambda line, node, client: comfy.lines.append((node, line))
    )
    known: dict[str, str] = {}
    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": stop,
            "unload_all_models": room,
            "soft_empty_cache": lambda force: None,
        },
        "comfy.utils": {"ProgressBar": lambda total: bar},
        "comfy.cli_args": {"args": SimpleNamespace(preview_size=384)},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": object, "io": io},
        "comfy_execution": {},
        "comfy_execution.utils": {"get_executing_context": lambda: SimpleNamespace(node_id="7")},
        "folder_paths": {
            "models_dir": str(comfy.models),
            "add_model_folder_path": known.__setitem__,
            "get_folder_paths": lambda key: [known[key]],
        },
        "server": {"PromptServer": SimpleNamespace(instance=server)},
    }
    found = {name: ModuleType(name) for name in contents}
    for name, content in contents.items():
        vars(found[name]).update(content)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(found[parent], own, found[name])
    return found


@contextmanager
def loaded(models: Path) -> Iterator[tuple[ModuleType, Comfy]]:
    """The pack as ComfyUI imports it, and its stand-in. `models`: ComfyUI's folder of that name."""
    comfy = Comfy(models)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules(comfy).items():
            patch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location(
            NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
        )
        assert spec is not None
        assert spec.loader is not None
        pack = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, NAME, pack)
        try:
            spec.loader.exec_module(pack)
            yield pack, comfy
        finally:
            for name in [each for each in sys.modules if each.startswith(f"{NAME}.")]:
                del sys.modules[name]
