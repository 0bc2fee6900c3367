"""The adapter of every family. A new one is a line here (docs/adding-a-model.md)."""

from __future__ import annotations

from typing import Any

from ...families import family_of
from ...families.base import TransformerShape
from .hart.steps import HartAdapter
from .infinity.steps import InfinityAdapter
from .transformer.adapter import ModelAdapter
from .var.steps import VarAdapter

ADAPTERS: dict[str, ModelAdapter[Any, Any]] = {
    adapter.family.name: adapter for adapter in (InfinityAdapter(), VarAdapter(), HartAdapter())
}


def adapter_of(transformer: TransformerShape) -> ModelAdapter[Any, Any]:
    """The adapter for a transformer's configuration."""
    return ADAPTERS[family_of(transformer).name]
