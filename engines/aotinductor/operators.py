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
LAYERS = f"inputs a multiple of {INPUT_STEP} up to {MOST_INPUTS}, and outputs of {OUTPUT_STEP}"


class Operand(NamedTuple):
    """A tensor that an operator reads."""

    name: str
    shape: tuple[str | int, ...]  # a name stands for one size in all operands
    dtype: str = ""  # any, where it is empty
    contiguous: str = "tensor"  # or "last axis", where the other strides are free, or "", where all are
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Operator:
    """fastvar::NAME: an operator of one result, whose type is that of the first operand."""

    name: str
    operands: tuple[Operand, ...]
    result: tuple[str, ...]  # its shape, in the names of the operands' sizes
    flags: tuple[str, ...] = ()  # arguments behind the operands that are true or false
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
        sizes: dict[str, int] = {}
        shapes = []
        for (name, dims, dtype, contiguous, _), tensor in zip(self.operands, arguments, strict=False):
            if tensor is None:
                continue
            shapes.append(f"{name} {list(tensor.shape)}")
            expected = [sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims]
            known = [size if isinstance(e, str) else e for e, size in zip(expected, tensor.shape, strict=False)]
            if len(dims) != tensor.dim() or known != list(tensor.shape):
                raise ValueError(f"{self}: {', '.join(shapes)}, expected [{', '.join(map(str, expected))}]")
            sizes |= {dim: size for dim, size in zip(dims, tensor.shape, strict=True) if isinstance(dim, str)}
            if dtype and tensor.dtype != getattr(torch, dtype):
                raise ValueError(f"{self}: {name} in {tensor.dtype}, expected torch.{dtype}")
            free = not contiguous or (contiguous == "last axis" and (tensor.shape[-1] <= 1 or tensor.stride(-1) == 1))
            if not free and not tensor.is_contiguous():
                raise ValueError(f"{self}: {name} with strides {tensor.stride()}, expected a contiguous {contiguous}")
        for takes, message in self.limits:
            if not takes(**sizes):
                raise ValueError(f"{self} {message.format(**sizes)}")
        return tuple(sizes[dim] for dim in self.result)


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


def _attention_given(q: Any, keys: Any, values: Any, bias: Any, out: Any) -> tuple[Any, ...]:
    tensors = (given for tensor in (q, keys, values) for given in (tensor, tensor.stride()[:2]))
    return (*tensors, bias, 0 if bias is None else bias.stride(0), out, q.shape[0], keys.shape[0], *q.shape[1:])


# softmax(q keys^T + bias) values, contiguous. The queries are scaled beforehand. The bias is finite: about -1e30 masks
# a key. Token and head strides are free, so prefixes and slices of a cache are read in place.
ATTENTION = Operator(
    "attention",
    (
        Operand("q", ("L", "heads", "head_dim"), "bfloat16", "last axis"),
        Operand("keys", ("S", "heads", "head_dim"), "bfloat16", "last axis"),
        Operand("values", ("S", "heads", "head_dim"), "bfloat16", "last axis"),
        Operand("bias", ("heads", 1, "S"), "float32", "last axis", optional=True),
    ),
    result=("L", "heads", "head_dim"),
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
