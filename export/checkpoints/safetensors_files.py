"""Tensors of a `.safetensors` file, mapped and not read. Knows the format, no model.

The safetensors library reads what it accepts. It refuses files with bytes behind the last tensor, which programs leave
that align or reserve space: their tensors are mapped here, after the same checks of the header.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...errors import CheckpointError

LONGEST_HEADER = 100_000_000  # bytes: the format's own limit
LENGTH_BYTES = 8
# fmt: off
TYPES: dict[str, torch.dtype] = {
    code: getattr(torch, name)
    for code, name in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
        "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    }.items()
    if hasattr(torch, name)
}
# fmt: on

_log = logging.getLogger(__name__)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors by name; the file is mapped.

    Raises:
        CheckpointError: not a safetensors file, or cut short.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        found = _with_trailing_bytes(path)
        if found is None:
            raise CheckpointError(
                f"{path} is not a whole safetensors file: {error}", expected="safetensors", fix="fetch the file again"
            ) from error
        return found
    return tensors


def _with_trailing_bytes(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file that is whole and holds bytes behind them; None where that is not what ails it."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - LENGTH_BYTES):
                return None
            header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
        entries = {name: _Entry(entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    end, start = 0, LENGTH_BYTES + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            return None
        end = entry.stop
    if not 0 < end < size - start:
        return None
    _log.warning("%s has %d bytes behind its last tensor; they are not read", path, size - start - end)
    data = torch.from_file(str(path), shared=False, size=start + end, dtype=torch.uint8)
    return {name: entry.of(data[start:]) for name, entry in entries.items()}


class _Entry:
    """One tensor as the header describes it.

    Raises:
        ValueError, TypeError, KeyError: the description is none.
    """

    def __init__(self, data: Any) -> None:
        self.dtype, self.shape, (self.start, self.stop) = TYPES[data["dtype"]], data["shape"], data["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*self.shape, self.start, self.stop)):
            raise ValueError("a size that is no whole number")
        if self.stop - self.start != math.prod(self.shape) * self.dtype.itemsize:
            raise ValueError("a shape of another size")

    def of(self, data: Tensor) -> Tensor:
        """The tensor, in place where its elements are aligned in memory."""
        held = data[self.start : self.stop]
        aligned = held.storage_offset() % self.dtype.itemsize == 0
        return (held if aligned else held.clone()).view(self.dtype).view(self.shape)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises:
    ValueError: of two entries of one name, readers disagree which counts.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an entry is there twice")
    return found
