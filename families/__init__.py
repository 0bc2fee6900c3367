"""The families of models, by name. A new one is a line here (docs/adding-a-model.md)."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from .base import Family, TransformerShape
from .hart import HART
from .infinity import INFINITY
from .var import VAR

FAMILIES: dict[str, Family[Any]] = {family.name: family for family in (INFINITY, VAR, HART)}
DEFAULT_MODEL = "infinity_2b"  # whose sizes are listed where nobody names a model


def family_named(name: str) -> Family[Any]:
    """The family of that name.

    Raises:
        CheckpointError: there is none.
    """
    if name not in FAMILIES:
        raise CheckpointError(
            f"no model family {name!r}", expected=f"one of {', '.join(FAMILIES)}", fix="update fastvar"
        )
    return FAMILIES[name]


def family_of(transformer: TransformerShape) -> Family[Any]:
    """The family that a transformer's configuration belongs to."""
    return next(family for family in FAMILIES.values() if isinstance(transformer, family.transformer))


def published_sizes() -> dict[str, TransformerShape]:
    """Transformers of all families by name."""
    return {name: config for family in FAMILIES.values() for name, config in family.transformers.items()}


def named_transformer(name: str) -> TransformerShape:
    """The published transformer of that name.

    Raises:
        CheckpointError: there is none.
    """
    sizes = published_sizes()
    if name not in sizes:
        raise CheckpointError(f"no model size {name!r}", expected="one of " + ", ".join(sizes))
    return sizes[name]
