"""The wiring of every family. A new one is a line here (docs/adding-a-model.md)."""

from __future__ import annotations

from typing import Any

from ..families import family_of
from .hart_steps import HartWiring
from .infinity_steps import InfinityWiring
from .var_steps import VarWiring
from .wiring import Wiring

WIRINGS: dict[str, Wiring] = {wiring.family.name: wiring for wiring in (InfinityWiring(), VarWiring(), HartWiring())}


def wiring_of(transformer: Any) -> Wiring:
    """The wiring for a transformer's configuration."""
    return WIRINGS[family_of(transformer).name]
