"""Facts about a model from the names and shapes of its tensors, for every model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import nn

from ....errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]
DIGITS = 6  # of the number of a layer, at most
T = TypeVar("T")
Config = TypeVar("Config")


class Shaped(Protocol):
    """What has a shape, made or not."""

    @property
    def shape(self) -> torch.Size: ...


def shapes_of(state: Mapping[str, Shaped]) -> Shapes:
    """Name -> shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def module_shapes(make: Callable[[Config], nn.Module], config: Config) -> Shapes:
    """Name -> shape of every tensor of a module, buffers included; nothing is allocated."""
    with torch.device("meta"):
        module = make(config)
    return shapes_of(module.state_dict())


def without_derived(state: Mapping[str, T], derived: re.Pattern[str], kept: Iterable[str] = ()) -> dict[str, T]:
    """A checkpoint without the tensors that follow from its configuration, which it may hold or not; `kept` stay."""
    return {name: tensor for name, tensor in state.items() if name in kept or not derived.search(name)}


def indices(names: Iterable[str], pattern: str) -> set[tuple[int, ...]]:
    """The numbers in every name that begins with a pattern, one per group of it; longer ones number nothing."""
    matches = (re.match(pattern, name) for name in names)
    groups = (match.groups() for match in matches if match)
    return {tuple(int(group) for group in found) for found in groups if max(map(len, found)) <= DIGITS}


def count(names: Iterable[str], pattern: str, kind: str) -> int:
    """How many parts are numbered by the one group of a pattern, from 0 on.

    Raises:
        CheckpointError: a number is left out.
    """
    found = {number for (number,) in indices(names, pattern)}
    lacking = next((number for number in range(len(found)) if number not in found), None)
    if lacking is not None:
        shown = pattern.replace("\\", "").replace("(d+)", str(lacking))
        raise CheckpointError(
            f"not {kind}: no tensor {shown}*, though {len(found)} such parts",
            expected="parts numbered from 0 on",
            fix="fetch the file again; of a checkpoint in several files, name the index",
        )
    return len(found)


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
