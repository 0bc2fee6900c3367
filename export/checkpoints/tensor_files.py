"""Reading tensors from files nobody vouches for, and checking them. Knows file formats, no model.

Never runs code from a file: pickles are read by torch's weights-only unpickler.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, NumericsError
from .safetensors_files import read_safetensors

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
NAMED = 5  # tensors named in an error before "and N more"
# Everything a damaged file has been seen to raise inside torch.load.
DAMAGED = (RuntimeError, EOFError, OSError, KeyError, IndexError, ValueError, TypeError, AttributeError)


def read_data(path: Path) -> Any:
    """What a `.safetensors` or torch file holds, memory-mapped where the format allows.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or would run code.
    """
    head = _first_bytes(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix not in TORCH_SUFFIXES:
        raise CheckpointError(
            f"{path} is not a checkpoint file", expected=f".safetensors or {', '.join(TORCH_SUFFIXES)}"
        )
    return _read_torch(path, head)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The plain state dict of a `.safetensors` or torch file, memory-mapped where the format allows.

    Raises:
        CheckpointError: the file cannot be read, is damaged, would run code, or holds something else.
    """
    data = read_data(path)
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{path} holds no state dict but a {type(data).__name__}", expected="named tensors")
    others = [str(name) for name, value in data.items() if not isinstance(value, Tensor)]
    if others:
        raise CheckpointError(
            f"{path} holds {len(others)} entries that are not tensors: {some(others)}",
            expected="a state dict",
            fix="save the model's state dict by itself",
        )
    return {str(name): value.detach() for name, value in data.items()}


def read_shards(index: Path) -> dict[str, Tensor]:
    """A checkpoint split over several files, by its index (`*.index.json`)."""
    return {name: tensor for path in shard_files(index) for name, tensor in read_tensors(path).items()}


def weight_files(path: Path) -> list[Path]:
    """A file of weights; or an index, and the shards that it names."""
    return [path, *shard_files(path)] if path.suffix == ".json" else [path]


def shard_files(index: Path) -> list[Path]:
    """The files an index names, beside it."""
    shards = read_json(index).get("weight_map")
    names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} names no shards", expected='{"weight_map": {tensor: file beside the index}}')
    return [index.with_name(name) for name in names]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    _first_bytes(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, a number of too many digits
        raise CheckpointError(f"{path} is not JSON: {error}", fix="fetch the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}", expected="an object")
    return data


def check_state(
    found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], source: str | Path = "checkpoint"
) -> None:
    """Exactly the expected tensors, in their shapes, in a floating type we read.

    Raises:
        CheckpointError: missing, extra, mis-shaped or mis-typed tensors: the first few by name, and how many.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    shared = [name for name in expected if name in found]
    shapes = [
        f"{name} {list(found[name].shape)} instead of {list(expected[name])}"
        for name in shared
        if tuple(found[name].shape) != tuple(expected[name])
    ]
    types = [f"{name} {found[name].dtype}" for name in shared if found[name].dtype not in FLOAT_TYPES]
    faults = {"missing": missing, "not part of the model": extra, "of another shape": shapes, "of another type": types}
    lines = [f"{len(names)} tensors {fault}: {some(names)}" for fault, names in faults.items() if names]
    if lines:
        raise CheckpointError(
            f"{source} does not fit the model: " + "; ".join(lines),
            expected=f"the {len(expected)} tensors of the configuration, in float16, bfloat16 or float32",
            fix="check that the configuration (config.json) is the one this file was trained with, and the file whole",
        )


def check_finite(weights: Mapping[str, Tensor], source: str | Path = "checkpoint") -> None:
    """Raises:
    NumericsError: a tensor holds NaN or infinity.
    """
    for name, tensor in weights.items():
        if tensor.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):  # one pass, no copy
            raise NumericsError(
                f"tensor {name} of {source} holds NaN or infinity",
                expected="finite weights",
                fix="fetch the file again; if it is a training checkpoint, take an earlier one",
            )


def digest(files: Iterable[Path], preface: str) -> str:
    """sha256 over a preface and the contents of files in the given order, wherever they lie."""
    total = hashlib.sha256(preface.encode())
    for path in files:
        total.update(b"\0" + str(path.stat().st_size).encode() + b"\0")  # where one file ends is part of the digest
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                total.update(block)
    return total.hexdigest()


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            head = stream.read(32)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist", expected="a file", fix="check the path") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder", expected="a file", fix="name the file inside it") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", expected="a readable file", fix="check its permissions"
        ) from error
    if not head:
        raise CheckpointError(f"{path} is empty", expected="a checkpoint", fix="fetch the file again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer", expected="the file itself", fix="run `git lfs pull`")
    return head


def _read_torch(path: Path, head: bytes) -> Any:
    zipped = head.startswith(b"PK")  # files of torch before 1.6 are bare pickles and cannot be mapped
    if not zipped and not head.startswith(b"\x80"):
        raise CheckpointError(
            f"{path} is not a torch checkpoint", expected="a file written by torch.save", fix="fetch the file again"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        names = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{path} was refused: " + (f"it asks to import {names[1]}" if names else "its pickle is not plain data"),
            expected="tensors in plain dictionaries; nothing a file asks to run is run",
            fix="if you trust its origin, save its state dict again as .safetensors; otherwise fetch it again",
        ) from error
    except DAMAGED as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({type(error).__name__}: {str(error)[:120]})",
            expected="a whole file written by torch.save",
            fix="fetch the file again and compare its size",
        ) from error


def some(names: list[str]) -> str:
    """The first few of some names, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
