"""What names and shapes of tensors say about a model. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..errors import CheckpointError


def indices(names: Iterable[str], pattern: str) -> set[tuple[int, ...]]:
    """The numbers in every name that begins with a pattern, one per group of it."""
    matches = (re.match(pattern, name) for name in names)
    return {tuple(int(group) for group in match.groups()) for match in matches if match}


def dims(shapes: Mapping[str, tuple[int, ...]], name: str, count: int, kind: str) -> tuple[int, ...]:
    """The shape of one tensor of a model of this kind.

    Raises:
        CheckpointError: there is no such tensor, or it has not `count` dimensions.
    """
    shape = shapes.get(name, ())
    if len(shape) != count:
        raise CheckpointError(
            f"not {kind}: " + (f"{name} has shape {list(shape)}" if name in shapes else f"no tensor {name}"),
            expected=f"the official names, {name} of {count} dimensions",
            fix="check that this is the right file; a model of another family is not supported",
        )
    return shape
