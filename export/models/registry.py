"""The wiring of every family. A new one is a line here (docs/adding-a-model.md)."""

from __future__ import annotations

from typing import Any

from ...families import family_of
from .hart.steps import HartWiring
from .infinity.steps import InfinityWiring
from .transformer.adapter import Wiring
from .var.steps import VarWiring

WIRINGS: dict[str, Wiring] = {wiring.family.name: wiring for wiring in (InfinityWiring(), VarWiring(), HartWiring())}


def wiring_of(transformer: Any) -> Wiring:
    """The wiring for a transformer's configuration."""
    return WIRINGS[family_of(transformer).name]
