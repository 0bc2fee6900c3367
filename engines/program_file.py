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

from ..errors import BundleError

LIBRARY = "library"


@dataclass(frozen=True)
class ProgramFile:
    """A library, and the constants that go before its inputs, in order."""

    library: bytes
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        packed = np.frombuffer(lzma.compress(self.library), np.uint8)
        numbered = {f"{position}.{name}": value for position, (name, value) in enumerate(self.constants.items())}
        data: bytes = save({LIBRARY: packed, **numbered})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> ProgramFile:
        """Raises:
        BundleError: not such a file.
        """
        try:
            tensors = load(data)
            library = lzma.decompress(tensors.pop(LIBRARY).tobytes())
        except (SafetensorError, KeyError, lzma.LZMAError) as error:
            raise BundleError(f"not an engine of AOTInductor: {error}", fix="rebuild the bundle") from error
        numbered = sorted((int(name.partition(".")[0]), name) for name in tensors)
        return cls(library, {name.partition(".")[2]: tensors[name] for _, name in numbered})
