"""Numbers that a file stores in 8 bits, made plain: a value times the scale beside it. Knows no model.

One convention is understood, that of most tools: a float8 or int8 tensor with one floating scale beside it, for all of
it or for each of its rows, under `<name>_scale` or, with the parts of the name the other way round, `scale_<name>`.
Whatever else belongs to quantised numbers is refused: taken as they are, they would make a silently wrong model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointError

FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
SCALED = (*FLOAT8, torch.int8)
SCALES = (torch.float16, torch.bfloat16, torch.float32)
# What quantising tools store beside or in place of a tensor: scales of inputs, zero points, codebooks, packed values.
MARK = re.compile(
    r"(^|.*\.)(\w*(weight|input|output|bias)_scale\w*|scale_(weight|input|output|bias)|\w*zero_points?|SCB|CB|weight_format"
    r"|(nested_)?(absmax|quant_map)|quant_state\.\w+|qweight|qzeros|scales|g_idx|weight_packed|weight_shape"
    r"|_(data|scale|shift)|scaled_fp8)$"
)
INPUT_SCALE = re.compile(
    r"(.*\.)?(scale_input|input_scale)$"
)  # for products with quantised inputs, of which there are none
FLAG = "scaled_fp8"  # says of a whole file that it has such scales
NAMED = 3  # of what is refused


def plain_numbers(state: Mapping[str, Tensor], source: str | Path = "checkpoint") -> dict[str, Tensor]:
    """A state dict with every scaled tensor multiplied out in fp32, and without the scales; all others as they are.

    Raises:
        CheckpointError: float8 without a scale, a scale of a plain tensor, or quantised numbers in another convention.
    """
    plain, read = dict(state), set[str]()
    for name in state:
        scales = [found for found in _scale_names(name) if found in state]
        if scales:
            plain[name] = _product(name, state[name], scales, state, source)
            read.update(scales)
    for name in read:
        del plain[name]
    if read:
        plain = {n: tensor for n, tensor in plain.items() if not (n == FLAG or INPUT_SCALE.fullmatch(n))}
    unread = [name for name in plain if MARK.match(name)]
    if unread:
        raise _refused(source, "quantised in a way that is not understood: " + _some(unread))
    bare = [f"{name} {tensor.dtype}" for name, tensor in plain.items() if tensor.dtype in FLOAT8]
    if bare:
        raise _refused(source, "stored in 8 bits without a scale: " + _some(bare))
    return plain


def _scale_names(name: str) -> tuple[str, str]:
    parent, dot, leaf = name.rpartition(".")
    return f"{name}_scale", f"{parent}{dot}scale_{leaf}"


def _product(name: str, values: Tensor, scales: list[str], state: Mapping[str, Tensor], source: str | Path) -> Tensor:
    scale = state[scales[0]]
    if len(scales) > 1 or values.dtype not in SCALED or scale.dtype not in SCALES:
        types = f"{values.dtype} beside {', '.join(f'{found} {state[found].dtype}' for found in scales)}"
        raise _refused(source, f"quantised in a way that is not understood: {name} {types}")
    shape = _aligned(scale, values)
    if shape is None:
        sizes = f"{list(values.shape)} beside {scales[0]} {list(scale.shape)}"
        raise _refused(source, f"quantised in a way that is not understood: {name} {sizes}")
    return values.float() * scale.float().reshape(shape)


def _aligned(scale: Tensor, values: Tensor) -> tuple[int, ...] | None:
    """The scale's shape with the values' dimensions: one number for all, or one for each row; None for other shapes."""
    rows = (values.shape[0], *(1 for _ in values.shape[1:])) if values.dim() else ()
    if scale.numel() == 1:
        return tuple(1 for _ in values.shape)
    square = values.dim() > 1 and scale.dim() == 1 and values.shape[0] == values.shape[-1]  # rows or columns?
    return rows if tuple(scale.shape) in (rows, rows[:1]) and values.dim() > 1 and not square else None


def _refused(source: str | Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source} holds tensors {what}",
        expected="float16, bfloat16 or float32; or float8 or int8 with one scale, or one a row, beside each tensor "
        "(*_scale, scale_*)",
        fix="take the file in 16 bits, or save it dequantised with the tool that quantised it",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
