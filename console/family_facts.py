"""What the families are told apart by, in the words of help texts: no command names a family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..families import FAMILIES
from ..families.base import Family


def policy_names() -> str:
    """Presets by name, those of some families alone with these: "dense, fastvar, strong (a family)"."""
    presets = dict.fromkeys(name for family in FAMILIES.values() for name in family.presets)
    return ", ".join(
        name if all(name in family.presets for family in FAMILIES.values()) else f"{name} ({_with_preset(name)})"
        for name in presets
    )


def families_with(choice: str) -> str:
    """The families that know a way of drawing, a field of `SamplingMode`."""
    return _named(lambda family: choice in family.drawings)


def families_with_setting(name: str) -> str:
    """The families that know a sampling setting, a field of `SamplingDefaults`."""
    return _named(lambda family: getattr(family.sampling, name) is not None)


def families_of_classes() -> str:
    """The families that draw classes in place of prompts."""
    return _named(lambda family: family.draws == "class label")


def guidance_off() -> str:
    """The guidance scales at which guidance is off, with the families: "1 (a family), 0 (others)"."""
    by_scale: dict[float, list[str]] = {}
    for name, family in FAMILIES.items():
        by_scale.setdefault(family.guidance_off, []).append(name)
    return ", ".join(f"{scale:g} ({', '.join(names)})" for scale, names in by_scale.items())


def _with_preset(preset: str) -> str:
    return _named(lambda family: preset in family.presets)


def _named(chosen: Callable[[Family[Any]], bool]) -> str:
    return ", ".join(name for name, family in FAMILIES.items() if chosen(family))
