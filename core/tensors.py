"""Tensors as engines see them: an address, an element type and a shape; and the memory beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Launch = Callable[[], None]


@dataclass(frozen=True)
class TensorRef:
    """Memory that an engine reads or writes: contiguous, alive for as long as the launch is."""

    address: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Scratch:
    """Memory that an engine may use while it runs: 256-byte aligned, shared with other engines of its device."""

    address: int
    size_bytes: int
