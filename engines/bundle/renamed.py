"""Manifests of format 4, whose entries had other names: they are read for one version more."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ...errors import RenamedWarning

OLD_FORMAT = 4
# Place in the manifest, "*" for each of a list -> old names and new ones.
RENAMED: dict[tuple[str, ...], Mapping[str, str]] = {
    ("plan",): {"drawing": "sampling_mode"},
    ("plan", "policy"): {"cached_scale": "restore_scale"},
    ("plan", "schedule"): {"position_grid": "rope_grid", "budget": "bucket"},
    ("transformer",): {"levels": "max_scales"},
    ("image_tokenizer",): {"levels": "max_scales"},
    ("sets", "*"): {"condition": "conditioning", "layer_condition": "layer_conditioning"},
    ("sets", "*", "steps", "*"): {
        "bridge": "sampling_head",
        "project": "qkv",
        "attend": "attn_mlp",
        "project_pruned": "qkv_pruned",
        "attend_pruned": "attn_mlp_pruned",
    },
}


def with_new_names(data: dict[str, Any], format_version: int) -> dict[str, Any]:
    """A manifest of format 4 in the names of today, with a warning."""
    warnings.warn(
        f"manifest.json has format version {OLD_FORMAT}: the next version of fastvar reads {format_version} alone; "
        "build the bundle anew",
        RenamedWarning,
        stacklevel=2,
    )
    renamed: dict[str, Any] = _renamed(data, ())
    return renamed | {"format_version": format_version}


def _renamed(value: Any, place: tuple[str, ...]) -> Any:
    if isinstance(value, list):
        return [_renamed(one, (*place, "*")) for one in value]
    if not isinstance(value, dict):
        return value
    names = RENAMED.get(place, {})
    return {names.get(name, name): _renamed(one, (*place, name)) for name, one in value.items()}
