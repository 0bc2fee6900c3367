"""The file of an AOTInductor engine: a shared library, and the constants of the step that it serves here.

One library serves every scale; what differs between them but is known beforehand (rotary tables, resizing matrices)
lies beside it. In the safetensors format, the library packed with xz.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ...errors import BundleError
from ..unpacking import UnpackingError, unpack_xz

LIBRARY = "library"


@dataclass(frozen=True)
class ProgramFile:
    """A library packed with xz, and the constants that go before its inputs, in order.

    It stays packed while it gets other constants: packing takes longer than all else, and steps share libraries.
    """

    packed: bytes
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, library: bytes, constants: Mapping[str, NDArray[Any]] | None = None) -> ProgramFile:
        """Pack a library."""
        return cls(lzma.compress(library), constants or {})

    @property
    def library(self) -> bytes:
        """Raises:
        BundleError: it is not packed with xz, or is absurdly large.
        """
        try:
            return unpack_xz(self.packed)
        except UnpackingError as error:
            raise _no_engine(error) from error

    def to_bytes(self) -> bytes:
        numbered = {f"{position}.{name}": value for position, (name, value) in enumerate(self.constants.items())}
        data: bytes = save({LIBRARY: np.frombuffer(self.packed, np.uint8), **numbered})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> ProgramFile:
        """Raises:
        BundleError: not such a file.
        """
        try:
            tensors = load(data)
            packed = tensors.pop(LIBRARY).tobytes()
            numbered = sorted((int(name.partition(".")[0]), name) for name in tensors)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:  # no such names, or element types
            raise _no_engine(error) from error
        return cls(packed, {name.partition(".")[2]: tensors[name] for _, name in numbered})


def _no_engine(error: Exception) -> BundleError:
    return BundleError(f"not an engine of AOTInductor: {error}", fix="rebuild the bundle")
