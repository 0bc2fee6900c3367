"""The pack's example workflows, as ComfyUI's page reads them, and what the page sends of them to be run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[3] / "integrations" / "comfyui"
FILES = sorted((PACK / "example_workflows").glob("*.json"))
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")  # of the page alone
Info = dict[str, Any]  # a node as /object_info tells it
Prompt = dict[str, dict[str, Any]]  # nodes by id: class_type and inputs


def workflow(name: str) -> dict[str, Any]:
    found = json.loads((PACK / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def as_prompt(graph: dict[str, Any], infos: dict[str, Info]) -> Prompt:
    """What the page posts to /prompt of a workflow: values by name, in place of widgets by position.

    Fails where a node has other inputs, or another number of widgets, than the workflow gives.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt: Prompt = {}
    for node in graph["nodes"]:
        kind = node["type"]
        if kind in NOTES:
            continue
        linked = {each["name"]: links[each["link"]] for each in node["inputs"]}
        values = list(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for name, takes in widgets(infos[kind]):
            inputs[name] = values[0]
            values = values[takes:]
        assert values == [], f"{kind}: {values} is given to no widget"
        known = set(inputs_of(infos[kind]))
        assert set(linked) == known - set(inputs), f"{kind} is given {sorted(linked)}"
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs | linked}
    return prompt


def inputs_of(info: Info) -> dict[str, list[Any]]:
    """Inputs by name, required ones first: type and options."""
    return info["input"].get("required", {}) | info["input"].get("optional", {})


def widgets(info: Info) -> Iterator[tuple[str, int]]:
    """Names of inputs that have a widget, and how many values a workflow holds of each."""
    for name, (kind, *rest) in inputs_of(info).items():
        options = rest[0] if rest else {}
        if isinstance(kind, list) or kind in WIDGETS:
            # A seed has a second widget, what becomes of it after a run, and so has the choice of a file.
            yield name, 2 if options.get("control_after_generate") or options.get("image_upload") else 1
