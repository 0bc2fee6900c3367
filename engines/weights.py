"""Weights on disk: a .safetensors file read in place through a memory map, and written as a stream.

Never holds more than one tensor in memory; knows no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import BundleError, InternalError, NumericsError
from .base import TensorRef
from .dtypes import BY_SAFETENSORS, all_finite, element_type, size_bytes, storage_dtype
from .manifest import FileRecord, TensorSpec

ALIGNMENT_BYTES = 64
_LENGTH_BYTES = 8
_LONGEST_HEADER_BYTES = 100_000_000  # the format's own limit
_BLOCK_ELEMENTS = 1 << 22  # checked, hashed and written at a time

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies, counted from the start of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class WeightFile:
    """A .safetensors file as read-only arrays over a memory map.

    `file[name]` copies nothing and holds the map open; bfloat16 comes as uint16, its name from `dtype(name)`.

    Raises:
        BundleError: not a safetensors file, truncated, or with an element type unknown here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        start, self._entries = _read_header(self.path)
        self._data: Array = np.memmap(self.path, np.uint8, mode="r")[start:]
        for name, entry in self._entries.items():
            _check_entry(self.path, name, entry, self._data.size)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Array:
        entry = self._entry(name)
        return self._data[entry.start : entry.stop].view(storage_dtype(entry.dtype)).reshape(entry.shape)

    def dtype(self, name: str) -> str:
        return self._entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def ref(self, name: str) -> TensorRef:
        """The tensor's memory, valid while this file object lives."""
        entry = self._entry(name)
        return TensorRef(self._data.ctypes.data + entry.start, entry.dtype, entry.shape)

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise BundleError(
                f"{self.path} holds no tensor {name!r}",
                expected=f"one of its {len(self)} tensors",
                fix="rebuild the bundle",
            ) from None


def _damaged(path: Path, problem: str) -> BundleError:
    return BundleError(
        f"{path} is not a whole safetensors file: {problem}", fix="copy the file again, or rebuild the bundle"
    )


def _read_header(path: Path) -> tuple[int, dict[str, _Entry]]:
    """Start of the data in bytes, and the tensors in the order of the file."""
    try:
        with path.open("rb") as handle:
            available = os.fstat(handle.fileno()).st_size - _LENGTH_BYTES
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(available, _LONGEST_HEADER_BYTES):
                raise _damaged(path, f"its header is {length} bytes long, {max(available, 0)} bytes are there")
            header = json.loads(handle.read(length))
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}", fix="check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    tensors = {name: _entry_from_json(path, name, e) for name, e in header.items() if name != "__metadata__"}
    return _LENGTH_BYTES + length, tensors


def _entry_from_json(path: Path, name: str, data: Any) -> _Entry:
    try:
        code, shape, (start, stop) = data["dtype"], tuple(data["shape"]), data["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"tensor {name!r} is described as {data!r}") from error
    if not isinstance(code, str) or code not in BY_SAFETENSORS:
        raise BundleError(
            f"{path}: tensor {name!r} has element type {code!r}",
            expected=f"one of {', '.join(BY_SAFETENSORS)}",
            fix="convert the weights",
        )
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise _damaged(path, f"tensor {name!r} is described as {data!r}")
    return _Entry(BY_SAFETENSORS[code].name, shape, start, stop)


def _check_entry(path: Path, name: str, entry: _Entry, data_bytes: int) -> None:
    size = size_bytes(entry.dtype, entry.shape)
    if entry.stop - entry.start != size:
        raise _damaged(path, f"tensor {name!r} takes {entry.stop - entry.start} bytes, its shape {size}")
    if entry.stop > data_bytes:
        raise _damaged(path, f"tensor {name!r} ends at byte {entry.stop} of {data_bytes}: truncated")


def write_weights(path: str | Path, specs: Mapping[str, TensorSpec], fetch: Callable[[str], Array]) -> FileRecord:
    """Write a .safetensors file, one tensor in memory at a time.

    Tensors of a multiple of 64 bytes come first and so begin on a cache line, whatever the order of `specs`.
    The file appears under its name only once it is whole.

    Args:
        path: the file to write.
        specs: element type and shape by tensor name.
        fetch: gives a tensor as a C-contiguous or strided array (uint16 for bfloat16); called once per name.

    Raises:
        NumericsError: a tensor holds NaN or infinity.
        InternalError: `fetch` gave another shape or element type than `specs` says.
        BundleError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    order = sorted(specs, key=lambda name: _layout_key(specs[name]))
    try:
        with _Writer(partial) as writer:
            writer.write(_header(order, specs))
            for name in order:
                _write_tensor(writer, name, specs[name], fetch(name))
            record = writer.finish(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return record


def _layout_key(spec: TensorSpec) -> tuple[bool, int]:
    ragged = size_bytes(spec.dtype, spec.shape) % ALIGNMENT_BYTES != 0
    return ragged, -storage_dtype(spec.dtype).itemsize


def _header(order: list[str], specs: Mapping[str, TensorSpec]) -> bytes:
    """Length and JSON, padded with spaces so that the data begins on a cache line."""
    header: dict[str, Any] = {}
    start = 0
    for name in order:
        spec = specs[name]
        stop = start + size_bytes(spec.dtype, spec.shape)
        code = element_type(spec.dtype).safetensors
        header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % ALIGNMENT_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _write_tensor(writer: _Writer, name: str, spec: TensorSpec, values: Array) -> None:
    if values.shape != spec.shape or values.dtype != storage_dtype(spec.dtype):
        raise InternalError(
            f"weight {name!r}: got {values.dtype}{list(values.shape)}, expected {spec.dtype}{list(spec.shape)}"
        )
    flat = np.ascontiguousarray(values).reshape(-1)
    for start in range(0, flat.size, _BLOCK_ELEMENTS):
        block = flat[start : start + _BLOCK_ELEMENTS]
        if not all_finite(spec.dtype, block):
            raise NumericsError(
                f"weight {name!r} ({spec.dtype}) holds NaN or infinity",
                expected="finite weights",
                fix="check the checkpoint, or build with another precision if the conversion overflowed",
            )
        writer.write(block.view(np.uint8).data)


class _Writer:
    """A file written once, hashed on the way. OSError becomes BundleError here, and only here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._handle: BinaryIO

    def __enter__(self) -> _Writer:
        try:
            self._handle = self.path.open("wb")
        except OSError as error:
            raise self._failure(error) from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._handle.close()
        except OSError as error:
            raise self._failure(error) from error

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._size_bytes += len(data)
        try:
            self._handle.write(data)
        except OSError as error:
            raise self._failure(error) from error

    def finish(self, path: Path) -> FileRecord:
        try:
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._handle.close()
            self.path.replace(path)
        except OSError as error:
            raise self._failure(error) from error
        return FileRecord(path.name, self._digest.hexdigest(), self._size_bytes)

    def _failure(self, error: OSError) -> BundleError:
        return BundleError(
            f"cannot write {self.path}: {error.strerror}", fix="check the free space and the permissions"
        )
