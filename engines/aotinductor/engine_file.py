"""The file of an AOTInductor engine: a shared library, and the constants of the step that it serves here.

One library serves every scale; what differs between them but is known beforehand (rotary tables, resizing matrices)
lies beside it. In the safetensors format, the library packed with xz; its metadata name the inputs that are weights of
linear layers and nothing else.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ...errors import BundleError
from ..scratch_estimates import is_layer
from ..spec import EngineSpec
from ..unpacking import UnpackingError, unpack_xz

LIBRARY = "library"
LINEAR_WEIGHTS = "linear_weights"
METADATA = "__metadata__"  # of safetensors' header


@dataclass(frozen=True)
class ProgramFile:
    """A library packed with xz, and the constants that go before its inputs, in order.

    It stays packed while it gets other constants: packing takes longer than all else, and steps share libraries.
    `linear_weights` are the places of inputs that only linear layers read, and as their weights: 1 is the last of all
    that a program is given, however many constants go before.
    """

    packed: bytes
    constants: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    linear_weights: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        library: bytes,
        constants: Mapping[str, NDArray[Any]] | None = None,
        linear_weights: tuple[int, ...] = (),
    ) -> ProgramFile:
        """Pack a library."""
        return cls(lzma.compress(library), constants or {}, linear_weights)

    @property
    def library(self) -> bytes:
        """Raises:
        BundleError: it is not packed with xz, or is absurdly large.
        """
        try:
            return unpack_xz(self.packed)
        except UnpackingError as error:
            raise _no_engine(error) from error

    def packable(self, spec: EngineSpec) -> frozenset[str]:
        """Inputs that may be given in oneDNN's order: weights of a transformer's layer that are multiplied by."""
        given = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        linear = {given[-place] for place in self.linear_weights if place <= len(given)}
        return frozenset(linear & spec.weights.keys() if is_layer(spec) else ())

    def to_bytes(self) -> bytes:
        numbered = {f"{position}.{name}": value for position, (name, value) in enumerate(self.constants.items())}
        told = {LINEAR_WEIGHTS: json.dumps(self.linear_weights)} if self.linear_weights else None
        data: bytes = save({LIBRARY: np.frombuffer(self.packed, np.uint8), **numbered}, metadata=told)
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
            places = tuple(int(place) for place in json.loads(_metadata(data).get(LINEAR_WEIGHTS, "[]")))
            if any(place < 1 for place in places):
                raise ValueError(f"{LINEAR_WEIGHTS} {list(places)}")
        except (SafetensorError, KeyError, ValueError, TypeError) as error:  # no such names, or element types
            raise _no_engine(error) from error
        return cls(packed, {name.partition(".")[2]: tensors[name] for _, name in numbered}, places)


def _metadata(data: bytes) -> dict[str, str]:
    """What a file of safetensors that was read before says of itself."""
    end = 8 + int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8:end]).get(METADATA, {})
    return found


def _no_engine(error: Exception) -> BundleError:
    return BundleError(f"not an engine of AOTInductor: {error}", fix="rebuild the bundle")
