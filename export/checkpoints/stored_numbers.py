"""Numbers that a file stores in 8 bits, made plain: a value times the scale beside it. Knows no model.

Two conventions are understood. That of most tools: a float8 or int8 tensor with one floating scale beside it, for all
of it or for each of its rows, under `<name>_scale` or, with the parts of the name the other way round, `scale_<name>`.
And fine-grained float8: `<name>_scale_inv`, the inverse of what values were multiplied by when they were stored, for
all of a tensor, for each row, or for each block of 128x128. Whatever else belongs to quantised numbers is refused: it
would make a silently wrong model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
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
INVERSE = "_scale_inv"
BLOCK = 128  # rows and columns that one scale of fine-grained float8 is for
NAMED = 3  # of what is refused


@dataclass(frozen=True)
class Scaled:
    """A tensor as values times scales, multiplied out in fp32 when it is asked for."""

    values: Tensor
    scale: Tensor  # one, one a row, or one a block of 128x128
    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def tensor(self) -> Tensor:
        scale = self.scale.float()
        if scale.dim() == 2 and (scale.shape[0] not in (1, self.shape[0]) or scale.shape[1] > 1):
            rows, columns = self.shape
            scale = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        return self.values.float() * scale


class PlainTensors(Mapping[str, Tensor]):
    """Tensors by name, those that are stored in 8 bits made plain one by one as they are asked for.

    stored: by name, what has a shape and an element type whether it is made or not.
    """

    def __init__(self, stored: Mapping[str, Tensor | Scaled]) -> None:
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        found = self.stored[name]
        return found.tensor() if isinstance(found, Scaled) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def only(self, names: Iterable[str]) -> PlainTensors:
        """Some of them, in the order of the names."""
        return PlainTensors({name: self.stored[name] for name in names})


def plain_numbers(state: Mapping[str, Tensor], source: str | Path = "checkpoint") -> PlainTensors:
    """A state dict with every scaled tensor multiplied out in fp32, and without the scales; all others as they are.

    Raises:
        CheckpointError: float8 without a scale, a scale of a plain tensor, or quantised numbers in another convention.
    """
    plain: dict[str, Tensor | Scaled] = dict(state)
    read = set[str]()
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
    return PlainTensors(plain)


def _scale_names(name: str) -> tuple[str, ...]:
    parent, dot, leaf = name.rpartition(".")
    return f"{name}_scale", f"{parent}{dot}scale_{leaf}", f"{name}{INVERSE}"


def _product(name: str, values: Tensor, scales: list[str], state: Mapping[str, Tensor], source: str | Path) -> Scaled:
    scale = state[scales[0]]
    if len(scales) > 1 or values.dtype not in SCALED or scale.dtype not in SCALES:
        types = f"{values.dtype} beside {', '.join(f'{found} {state[found].dtype}' for found in scales)}"
        raise _refused(source, f"quantised in a way that is not understood: {name} {types}")
    shape = _aligned(scale, values)
    if shape is None and scales[0].endswith(INVERSE) and _is_blocks(scale, values):
        shape = tuple(scale.shape)
    if shape is None:
        sizes = f"{list(values.shape)} beside {scales[0]} {list(scale.shape)}"
        raise _refused(source, f"quantised in a way that is not understood: {name} {sizes}")
    return Scaled(values, scale.reshape(shape))


def _is_blocks(scale: Tensor, values: Tensor) -> bool:
    """One number for each block of 128x128, what is left at the edges counted as blocks."""
    return values.dim() == 2 and tuple(scale.shape) == tuple(-(-size // BLOCK) for size in values.shape)


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
        "(*_scale, scale_*, *_scale_inv)",
        fix="take the file in 16 bits, or save it dequantised with the tool that quantised it",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
