"""Weights on disk: a .safetensors file read in place through a memory map, and written as a stream.

Never holds more than one tensor in memory; knows no model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ...core.dtypes import BY_SAFETENSORS, all_finite, element_type, size_bytes, storage_dtype
from ...core.files import whole_file
from ...core.tensors import TensorRef
from ...errors import BundleError, CheckpointError, InternalError, NumericsError
from ..spec import TensorSpec
from .manifest import FileRecord

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

    Args:
        path: the file; only its name where `handle` is given.
        handle: the file, opened for reading in binary; may be closed afterwards.

    Raises:
        BundleError: not a safetensors file, truncated, with an element type unknown here, or with tensors that overlap,
            lie across their elements' alignment, or leave room for what belongs to none.
    """

    def __init__(self, path: str | Path, handle: BinaryIO | None = None) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") if handle is None else nullcontext(handle) as file:
                start, self._entries = _read_header(self.path, file)
                mapped = np.memmap(file, np.uint8, mode="r")
        except OSError as error:
            raise BundleError(
                f"cannot read {self.path}: {error.strerror}", fix="check the path and its permissions"
            ) from error
        self._data: Array = mapped[start:]
        _check_places(self.path, self._entries, start, self._data.size)

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


def _read_header(path: Path, handle: BinaryIO) -> tuple[int, dict[str, _Entry]]:
    """Start of the data in bytes, and the tensors in the order of the file."""
    handle.seek(0)
    available = os.fstat(handle.fileno()).st_size - _LENGTH_BYTES
    length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
    if not 2 <= length <= min(available, _LONGEST_HEADER_BYTES):
        raise _damaged(path, f"its header is {length} bytes long, {max(available, 0)} bytes are there")
    try:
        header = json.loads(handle.read(length), object_pairs_hook=partial(_without_duplicates, path))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    tensors = {name: _entry_from_json(path, name, e) for name, e in header.items() if name != "__metadata__"}
    return _LENGTH_BYTES + length, tensors


def _without_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two tensors of one name, readers disagree which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _damaged(path, f"its header names {twice[0]!r} twice")
    return found


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


def _check_places(path: Path, entries: Mapping[str, _Entry], start: int, data_bytes: int) -> None:
    """Every tensor has bytes of its own, and every byte belongs to one. The data begins at byte `start` of the file."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        size = size_bytes(entry.dtype, entry.shape)
        if entry.stop - entry.start != size:
            raise _damaged(path, f"tensor {name!r} takes {entry.stop - entry.start} bytes, its shape {size}")
        if entry.stop > data_bytes:
            raise _damaged(path, f"tensor {name!r} ends at byte {entry.stop} of {data_bytes}: truncated")
        if (start + entry.start) % storage_dtype(entry.dtype).itemsize:
            raise _damaged(path, f"tensor {name!r} begins at byte {start + entry.start}, across its elements")
        if entry.start < end and size:
            raise _damaged(path, f"tensor {name!r} overlaps the one before it")
        _check_gap(path, entry.start - end, f"before tensor {name!r}")
        end = max(end, entry.stop)
    _check_gap(path, data_bytes - end, "at its end")


def _check_gap(path: Path, gap: int, where: str) -> None:
    """Some programs leave out bytes so that tensors begin on a cache line; what is larger holds something."""
    if gap >= ALIGNMENT_BYTES:
        raise _damaged(path, f"{gap} bytes {where} belong to no tensor")


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
        CheckpointError: `fetch` cannot read a tensor.
    """
    path = Path(path)
    order = sorted(specs, key=lambda name: _layout_key(specs[name]))
    with _refused(path), whole_file(path, sync=True) as handle:
        writer = _Writer(handle)
        writer.write(_header(order, specs))
        for name in order:
            _write_tensor(writer, name, specs[name], _fetched(name, fetch))
        return FileRecord(path.name, writer.digest.hexdigest(), writer.size_bytes)


def _fetched(name: str, fetch: Callable[[str], Array]) -> Array:
    try:
        return fetch(name)
    except OSError as error:
        raise CheckpointError(f"weight {name!r} cannot be read: {error}", fix="check the checkpoint's files") from error


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Full disks and missing permissions, as errors of the bundle."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"cannot write {path}: {error.strerror}", fix="check the free space and the permissions"
        ) from error


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
    """Hashes what it writes."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.size_bytes += len(data)
        self._handle.write(data)
