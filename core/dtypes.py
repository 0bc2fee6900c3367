"""Element types by name: numpy's own names, plus bfloat16 and float8, which numpy stores as bare bits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InternalError, PlanError


@dataclass(frozen=True)
class ElementType:
    """One element type in the three vocabularies that meet here.

    `special` is the exponent mask of a type that numpy only stores: an element with all these bits set is
    not finite.
    """

    name: str
    storage: str  # numpy dtype that holds the bits
    safetensors: str
    onnx: int  # onnx.TensorProto.DataType
    onnxruntime: str  # as in "tensor(float)"
    special: int = 0


_TYPES = (
    ElementType("float64", "float64", "F64", 11, "double"),
    ElementType("float32", "float32", "F32", 1, "float"),
    ElementType("float16", "float16", "F16", 10, "float16"),
    ElementType("bfloat16", "uint16", "BF16", 16, "bfloat16", special=0x7F80),
    ElementType("float8_e4m3fn", "uint8", "F8_E4M3", 17, "float8e4m3fn", special=0x7F),
    ElementType("int64", "int64", "I64", 7, "int64"),
    ElementType("int32", "int32", "I32", 6, "int32"),
    ElementType("int16", "int16", "I16", 5, "int16"),
    ElementType("int8", "int8", "I8", 3, "int8"),
    ElementType("uint64", "uint64", "U64", 13, "uint64"),
    ElementType("uint32", "uint32", "U32", 12, "uint32"),
    ElementType("uint16", "uint16", "U16", 4, "uint16"),
    ElementType("uint8", "uint8", "U8", 2, "uint8"),
    ElementType("bool", "bool", "BOOL", 9, "bool"),
)
BY_NAME = {t.name: t for t in _TYPES}
BY_SAFETENSORS = {t.safetensors: t for t in _TYPES}
BY_ONNX = {t.onnx: t for t in _TYPES}
BY_ONNXRUNTIME = {f"tensor({t.onnxruntime})": t for t in _TYPES}


def element_type(name: str) -> ElementType:
    """Look up a type by name.

    Raises:
        InternalError: a type that fastvar does not use.
    """
    try:
        return BY_NAME[name]
    except KeyError:
        raise InternalError(f"unknown element type {name!r}, expected one of {', '.join(BY_NAME)}") from None


def storage_dtype(name: str) -> np.dtype[np.generic]:
    """The numpy dtype that holds elements of a type: uint16 for bfloat16."""
    return np.dtype(element_type(name).storage)


def size_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * storage_dtype(name).itemsize


def all_finite(name: str, values: npt.NDArray[Any]) -> bool:
    """Whether no element is NaN or infinite; integers always are finite."""
    special = element_type(name).special
    if special:
        return not bool(np.any((values & special) == special))
    return values.dtype.kind != "f" or bool(np.isfinite(values).all())


def human_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


# Decimal and binary units as they are written; a letter alone is binary, as Docker and Java read it.
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {letter + end: 1024**power for power, letter in enumerate("kmgt", start=1) for end in ("", "ib")}


def parse_bytes(text: str) -> int:
    """'15GiB' -> 16106127360. 1 GB is 1000**3 bytes, 1 GiB and 1g are 1024**3; upper or lower case, a space or none.

    Raises:
        PlanError: not an amount of memory, or less than one byte.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    if found is None or found[2] not in _UNITS or (size := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise PlanError(f"memory {text!r} not understood", expected="a number with a unit: 15GiB, 15GB, 900MiB, 1.5g")
    return size
