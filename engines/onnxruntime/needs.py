"""What an ONNX graph asks of the library that runs it: its IR version and operator sets, read from its bytes.

The runtime has no package `onnx`, so the few fields are read by hand; nothing else of the graph is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

# Numbers of fields in onnx.proto: of a model, and of an operator set that it imports.
IR_VERSION, OPSET_IMPORT = 1, 8
DOMAIN, VERSION = 1, 2
VARINT, BYTES = 0, 2  # kinds of fields in protobuf; others are of a fixed size
FIXED = {1: 8, 5: 4}


@dataclass(frozen=True)
class GraphNeeds:
    """The IR version, and the version of every operator set by its domain; "" is ONNX's own."""

    ir_version: int = 0
    opsets: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sets = " and ".join(f"{domain or 'ONNX'} {version}" for domain, version in sorted(self.opsets.items()))
        return f"IR version {self.ir_version}, operators of {sets or 'no set'}"


def graph_needs(graph: bytes) -> GraphNeeds | None:
    """Of a serialized model; None for bytes that are none."""
    ir_version, opsets = 0, {}
    try:
        for number, value in _fields(graph):
            if number == IR_VERSION and isinstance(value, int):
                ir_version = value
            elif number == OPSET_IMPORT and isinstance(value, bytes):
                own = dict(_fields(value))
                opsets[bytes(own.get(DOMAIN, b"")).decode()] = int(own.get(VERSION, 0))
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return GraphNeeds(ir_version, opsets) if ir_version and opsets else None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of a message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length, at = _varint(data, at) if kind == BYTES else (FIXED[kind], at)
        if at + length > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the last byte without the eighth, and where it ends."""
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")
