"""Operators of torch with our C++ (kernels/) behind them, for CPUs.

Engines link the C++ statically and call it without Python; eager torch calls the same functions through ctypes. Torch
is imported when an operator is registered.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ...core.platform import import_extra
from ...errors import BackendError
from .native import AVX512_BF16, AVX512_VNNI, LIBRARY, build, cpu_lacks

LARGEST_HEAD, HEAD_STEP = 256, 16
HEADS = f"a multiple of {HEAD_STEP} up to {LARGEST_HEAD}"
INPUT_STEP, MOST_INPUTS, OUTPUT_STEP = 4, 1 << 16, 16  # longer sums of products might leave int32
CHANNEL_STEP, MOST_CHANNELS = 16, 4096  # of WINOGRAD; longer sums of products might leave int32
CHANNELS = f"multiples of {CHANNEL_STEP}, of inputs up to {MOST_CHANNELS}"
LAYERS = f"inputs a multiple of {INPUT_STEP} up to {MOST_INPUTS}, and outputs of {OUTPUT_STEP}"


Extent = str | int | Callable[..., int]  # a name stands for one size in all operands; or (**sizes) -> the size


def _size(extent: Extent, sizes: Mapping[str, int]) -> Any:
    """The size that an extent stands for; its name, where nothing has it yet."""
    if isinstance(extent, str):
        return sizes.get(extent, extent)
    return extent if isinstance(extent, int) else extent(**sizes)


class Operand(NamedTuple):
    """A tensor that an operator reads."""

    name: str
    shape: tuple[Extent, ...]
    dtype: str = ""  # any, where it is empty
    contiguous: str = "tensor"  # or "last axis", where the other strides are free, or "", where all are
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Operator:
    """fastvar::NAME: an operator of one result, whose type is that of the first operand."""

    name: str
    operands: tuple[Operand, ...]
    result: tuple[Extent, ...]  # its shape, in the names of the operands' sizes
    flags: tuple[str, ...] = ()  # arguments behind the operands that are true or false; they count as sizes too
    types: tuple[str, ...] = ()  # that the first operand may have, and all others then share; any, where it is empty
    limits: tuple[tuple[Callable[..., bool], str], ...] = ()  # (**sizes) -> whether it takes them; what it says if not
    given: Callable[..., tuple[Any, ...]] | None = None  # (*arguments, result) -> what the C function takes first
    eager: Callable[..., Any] | None = None  # (torch, *arguments) -> result, in place of the C function
    failures: Mapping[int, str] = field(default_factory=dict)  # by the status that the C function returns
    instructions: tuple[str, ...] = ()  # that the CPU must have
    instead: str = ""  # what to do where it lacks them

    def __str__(self) -> str:
        return f"fastvar::{self.name}"

    @property
    def schema(self) -> str:
        """The signature in torch's language."""
        tensors = [f"Tensor{'?' * operand.optional} {operand.name}" for operand in self.operands]
        return f"({', '.join([*tensors, *(f'bool {flag}' for flag in self.flags)])}) -> Tensor"

    @property
    def declaration(self) -> str:
        """The C declaration of the function that engines call."""
        tensors = [f"AtenTensorHandle{'*' * operand.optional} {operand.name}" for operand in self.operands]
        arguments = ", ".join([*tensors, *(f"int32_t {flag}" for flag in self.flags), "AtenTensorHandle* out"])
        return f"int32_t aoti_torch_cpu_{self.name}({arguments})"

    def check(self, torch: Any, *arguments: Any) -> tuple[int, ...]:
        """The shape of the result.

        Raises:
            ValueError: an operand has another shape, type or memory layout than the operator takes.
        """
        sizes: dict[str, int] = dict(zip(self.flags, arguments[len(self.operands) :], strict=True))
        shapes = []
        for (name, dims, dtype, contiguous, _), tensor in zip(self.operands, arguments, strict=False):
            if tensor is None:
                continue
            shapes.append(f"{name} {list(tensor.shape)}")
            expected = [_size(dim, sizes) for dim in dims]
            known = [size if isinstance(e, str) else e for e, size in zip(expected, tensor.shape, strict=False)]
            if len(dims) != tensor.dim() or known != list(tensor.shape):
                raise ValueError(f"{self}: {', '.join(shapes)}, expected [{', '.join(map(str, expected))}]")
            sizes |= {dim: size for dim, size in zip(dims, tensor.shape, strict=True) if isinstance(dim, str)}
            taken = [getattr(torch, found) for found in ((dtype,) if dtype else self.types)]
            if self.types and tensor is not arguments[0]:
                taken = [arguments[0].dtype]
            if taken and tensor.dtype not in taken:
                raise ValueError(f"{self}: {name} in {tensor.dtype}, expected {' or '.join(map(str, taken))}")
            free = not contiguous or (contiguous == "last axis" and (tensor.shape[-1] <= 1 or tensor.stride(-1) == 1))
            if not free and not tensor.is_contiguous():
                raise ValueError(f"{self}: {name} with strides {tensor.stride()}, expected a contiguous {contiguous}")
        for takes, message in self.limits:
            if not takes(**sizes):
                raise ValueError(f"{self} {message.format(**sizes)}")
        return tuple(_size(dim, sizes) for dim in self.result)


@functools.cache
def register(operator: Operator) -> Any:
    """Make an operator known to this process, for tracing, for loading programs and for eager use; returns it.

    Raises:
        BackendError: torch is not installed.
    """
    torch = import_extra("torch", "aotinductor")

    def eager(*arguments: Any) -> Any:
        shape = operator.check(torch, *arguments)
        if operator.eager is not None:
            return operator.eager(torch, *arguments)
        assert operator.given is not None
        out = torch.empty(shape, dtype=arguments[0].dtype)
        given = map(_as_c, operator.given(*arguments, out))
        if status := _function(operator)(*given, ctypes.c_int32(torch.get_num_threads())):
            raise RuntimeError(f"{operator}: {operator.failures[status]}")
        return out

    def fake(*arguments: Any) -> Any:
        return arguments[0].new_empty(operator.check(torch, *arguments))

    made = torch.library.custom_op(str(operator), eager, mutates_args=(), device_types="cpu", schema=operator.schema)
    made.register_fake(fake)
    return getattr(torch.ops.fastvar, operator.name).default


def _as_c(argument: Any) -> Any:
    """A tensor as its address, several strides as an array, numbers in the types that the kernels declare."""
    if isinstance(argument, tuple):
        return (ctypes.c_int64 * len(argument))(*argument)
    if isinstance(argument, int):
        return ctypes.c_int32(argument) if isinstance(argument, bool) else ctypes.c_int64(argument)
    return ctypes.c_void_p(None if argument is None else argument.data_ptr())


@functools.cache
def _function(operator: Operator) -> Callable[..., int]:
    if lacking := cpu_lacks(operator.instructions):
        raise BackendError(f"{operator}: this CPU lacks {', '.join(lacking)}", fix=operator.instead)
    function: Callable[..., int] = getattr(ctypes.CDLL(str(build() / LIBRARY)), f"fastvar_{operator.name}")
    return function


def supports_heads(head_dim: int, dtype: str = "bfloat16") -> bool:
    """Whether ATTENTION takes heads of this size; a program with others keeps torch's own attention."""
    return dtype == "bfloat16" and 0 < head_dim <= LARGEST_HEAD and head_dim % HEAD_STEP == 0


def supports_layer(inputs: int, outputs: int) -> bool:
    """Whether LINEAR_INT8 takes layers of this size; rows may be any number."""
    return 0 < inputs <= MOST_INPUTS and inputs % INPUT_STEP == 0 and outputs > 0 and outputs % OUTPUT_STEP == 0


def supports_channels(inputs: int, outputs: int) -> bool:
    """Whether WINOGRAD takes convolutions of so many channels."""
    return 0 < inputs <= MOST_CHANNELS and inputs % CHANNEL_STEP == 0 and outputs > 0 and outputs % CHANNEL_STEP == 0


def _attention_given(q: Any, keys: Any, values: Any, bias: Any, int8: bool, out: Any) -> tuple[Any, ...]:
    tensors = (given for tensor in (q, keys, values) for given in (tensor, tensor.stride()[:2]))
    sizes = (q.shape[0], keys.shape[0], *q.shape[1:])
    return (*tensors, bias, 0 if bias is None else bias.stride(0), out, *sizes, bool(int8))


# softmax(q keys^T + bias) values, contiguous. The queries are scaled beforehand. The bias is finite: about -1e30 masks
# a key. Token and head strides are free, so prefixes and slices of a cache are read in place. `int8`: in each head
# by itself, q is rounded to int8 row by row, as x is for LINEAR_INT8, keys 64 by 64, masked ones too, and values 512
# keys at a time, channel by channel; a probability is in 255ths of the largest of its row in the same 512, rounded up
# or down so that the mean over neighbours stays what it was.
ATTENTION = Operator(
    "attention",
    (
        Operand("q", ("L", "heads", "head_dim"), "bfloat16", "last axis"),
        Operand("keys", ("S", "heads", "head_dim"), "bfloat16", "last axis"),
        Operand("values", ("S", "heads", "head_dim"), "bfloat16", "last axis"),
        Operand("bias", ("heads", 1, "S"), "float32", "last axis", optional=True),
    ),
    result=("L", "heads", "head_dim"),
    flags=("int8",),
    limits=(
        (lambda head_dim, **_: supports_heads(head_dim), f"of heads of {{head_dim}}: expected {HEADS}"),
        (lambda S, **_: S > 0, "of keys [0, {heads}, {head_dim}]: expected at least one"),
    ),
    given=_attention_given,
    failures={1: "unsupported head size", 2: "no keys", 3: "no memory for its scratch"},
    instructions=AVX512_BF16,
    instead="use scaled_dot_product_attention",
)


# (q values) * row_scale * scale + bias, contiguous; `gelu` applies the tanh form. q is x over row_scale rounded to the
# nearest integer, and row_scale fp32, the largest magnitude of the row / 127. The product is exact; the rest is fp32.
LINEAR_INT8 = Operator(
    "linear_int8",
    (
        Operand("x", ("M", "K"), "bfloat16", "last axis"),
        Operand("values", ("K", "N"), "int8"),
        Operand("scale", ("N",), "bfloat16"),
        Operand("bias", ("N",), "bfloat16"),
    ),
    result=("M", "N"),
    flags=("gelu",),
    limits=((lambda K, N, **_: supports_layer(K, N), f"of {{K}} inputs and {{N}} outputs: expected {LAYERS}"),),
    given=lambda x, *others: (x, x.stride(0), *others[:3], others[4], x.shape[0], *others[0].shape, others[3]),
    failures={1: "unsupported size", 2: "no memory for its scratch"},
    instructions=AVX512_VNNI,
    instead="build with --weights int8",
)


def _linear(torch: Any, x: Any, weight: Any, bias: Any, gelu: bool) -> Any:
    how: tuple[Any, ...] = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *how)


# oneDNN's linear layer for weights that are arguments; `gelu` applies its tanh form. It adds the bias, and applies the
# GELU, while the result is in registers. Torch's own writes the bias first, reads it back, and runs the GELU over
# memory again.
LINEAR = Operator(
    "linear",
    (
        Operand("x", ("M", "K"), contiguous=""),
        Operand("weight", ("N", "K"), contiguous=""),
        Operand("bias", ("N",), contiguous=""),
    ),
    result=("M", "N"),
    flags=("gelu",),
    eager=_linear,
)


def _written(size: str, pads: str) -> Callable[..., int]:
    """Rows or columns that WINOGRAD writes."""
    return lambda **sizes: 2 * sizes[size] if sizes["enlarges"] else sizes[size] + 2 * sizes[pads] - 2


_WRITTEN = ("N", _written("H", "pads_rows"), _written("W", "pads_columns"), "K")

# A 3x3 convolution of stride 1, bias and residual added; `pads_rows` puts a row of zeros above and below,
# `pads_columns` a column on either side. `enlarges`: of x enlarged by two, every pixel four times; padded both ways.
# In bfloat16 the result is rounded once, and what comes before adds 3 % at most to that error (root mean square).
WINOGRAD = Operator(
    "winograd",
    (
        Operand("x", ("N", "H", "W", "C")),
        Operand("weight", ("K", "C", 3, 3)),
        Operand("bias", ("K",), optional=True),
        Operand("residual", _WRITTEN, optional=True),
    ),
    result=_WRITTEN,
    flags=("pads_rows", "pads_columns", "enlarges"),
    types=("bfloat16", "float32"),
    limits=(
        (lambda C, K, **_: supports_channels(C, K), f"of {{C}} to {{K}} channels: expected {CHANNELS}"),
        (
            lambda pads_rows, pads_columns, enlarges, **_: not enlarges or (pads_rows and pads_columns),
            "of an enlarged image: expected padding of rows and columns",
        ),
        (
            lambda H, W, pads_rows, pads_columns, **_: H + 2 * pads_rows > 2 and W + 2 * pads_columns > 2,
            "of {H} rows and {W} columns: expected three of each, padding included",
        ),
    ),
    given=lambda x, weight, bias, residual, *flags_and_out: (
        *(x, weight, bias, residual, flags_and_out[-1], *x.shape, weight.shape[0]),
        *(*map(bool, flags_and_out[:-1]), x.element_size() == 2),
    ),
    failures={1: "unsupported size", 2: "no memory for its scratch"},
    instructions=AVX512_VNNI,
    instead="use conv2d",
)
