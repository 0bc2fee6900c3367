"""A state dict inside what a training program saved: which of the dictionaries in a file it is, and its plain names.

Knows the keys that programs of all kinds save under; those of a family's own program are given to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from .tensor_files import read_data, read_shards, some

DEEPEST = 8  # dictionaries within each other
# Keys that any training program may save under; of averaged weights (EMA), and of those that are trained.
AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema")
PLAIN = ("trainer", "state_dict", "model", "model_state_dict", "module")
# What distributed and compiled modules put into names. `module` is also an official part of names, numbers behind it.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MODULE = re.compile(r"(?<![^.])module\.(?!\d)")


@dataclass(frozen=True)
class StateKeys:
    """The keys that a part of a model is saved under by the training programs of its families.

    averaged: of weights averaged over training, which come first. trained: of the weights themselves.
    """

    averaged: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()

    @property
    def ranks(self) -> tuple[tuple[str, ...], ...]:
        """All keys: those of one rank have no order, and none of a later rank counts beside one of an earlier."""
        return (*self.averaged, *AVERAGED), self.trained, PLAIN

    @property
    def names(self) -> list[str]:
        return [key for rank in self.ranks for key in rank]


@dataclass(frozen=True)
class State:
    """Tensors by their plain names, and under which keys they lay.

    passed_over: keys of other weights there, where averaged ones were chosen.
    """

    tensors: dict[str, Tensor]
    keys: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """The keys in plain words; empty for a plain state dict."""
        if not self.keys:
            return ""
        choice = f", the averaged weights; not {' or '.join(self.passed_over)}" if self.passed_over else ""
        return " > ".join(self.keys) + choice


def read_state(path: Path, keys: StateKeys) -> State:
    """The state dict of a file of weights, plain or saved by a training program; or of an index, over all its shards.

    Raises:
        CheckpointError: the file cannot be read, or see `find_state`.
    """
    if path.suffix == ".json":
        return State(plain_names(read_shards(path), path))
    return find_state(read_data(path), path, keys)


def find_state(data: Any, path: Path, keys: StateKeys) -> State:
    """The state dict in the data of a file.

    Raises:
        CheckpointError: there is none, several and no rule to choose by, or two tensors of one name.
    """
    opened: list[str] = []
    passed_over: tuple[str, ...] = ()
    while len(opened) < DEEPEST and (choices := list(_choices(data, keys))):
        best, *others = choices
        if len(best) > 1:
            raise _undecided(path, opened, best)
        opened.append(best[0])
        if best[0] in keys.ranks[0]:
            passed_over += tuple(key for rank in others for key in rank)
        data = data[best[0]]
    return State(plain_names(_tensors(data, path, opened, keys), path), tuple(opened), passed_over)


def plain_names(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A state dict without what wrappers of modules put into its names.

    Raises:
        CheckpointError: two names become one.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = MODULE.sub("", WRAPPERS.sub("", name))
        if short in plain:
            raise CheckpointError(
                f"{path} holds two tensors {short}, one of them as {name}",
                expected="each tensor under one name",
                fix="save the state dict of the model itself, without its wrappers",
            )
        plain[short] = tensor
    return plain


def _choices(data: Any, keys: StateKeys, depth: int = 0) -> Iterator[list[str]]:
    """The known keys of a dictionary that lead to tensors, rank by rank."""
    if isinstance(data, dict):
        for rank in keys.ranks:
            if found := [key for key in rank if key in data and _leads_to_tensors(data[key], keys, depth + 1)]:
                yield found


def _leads_to_tensors(data: Any, keys: StateKeys, depth: int) -> bool:
    if not isinstance(data, dict) or depth > DEEPEST:
        return False
    return any(isinstance(value, Tensor) for value in data.values()) or any(_choices(data, keys, depth))


def _undecided(path: Path, opened: Iterable[str], found: list[str]) -> CheckpointError:
    where = " > ".join(opened)
    return CheckpointError(
        f"{path} holds {len(found)} state dicts" + (f" under {where}" if where else "") + f": {', '.join(found)}",
        expected="one, or averaged weights (EMA) beside those that they average",
        fix="save the one that is meant by itself",
    )


def _tensors(data: Any, path: Path, opened: list[str], keys: StateKeys) -> dict[str, Tensor]:
    where = f"{path} ({' > '.join(opened)})" if opened else str(path)
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{where} holds no state dict but a {type(data).__name__}", expected="named tensors")
    others = [str(name) for name, value in data.items() if not isinstance(value, Tensor)]
    if others:
        dictionaries = [str(name) for name, value in data.items() if isinstance(value, dict) and value]
        hint = f" (dictionaries: {some(dictionaries)})" if dictionaries else ""
        raise CheckpointError(
            f"{where} holds {len(others)} entries that are not tensors: {some(others)}{hint}",
            expected=f"a state dict, plain or under one of {', '.join(dict.fromkeys(keys.names))}",
            fix="save the model's state dict by itself, or under one of these keys",
        )
    return {str(name): value.detach() for name, value in data.items()}
