"""The operator fastvar::linear_int8: a linear layer of int8 weights and int8 activations, for CPUs with AVX512-VNNI.

Its kernel is kernels/linear_int8.cpp; engines link it, eager torch calls it through ctypes. Knows no backend and no
model. Torch is imported when the operator is asked for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from ..errors import BackendError
from ..packages import import_extra
from .native import LINEAR_INT8, build, cpu_lacks

OPERATOR = "fastvar::linear_int8"
SCHEMA = "(Tensor x, Tensor values, Tensor scale, Tensor bias, bool gelu) -> Tensor"
DECLARATION = (
    "int32_t aoti_torch_cpu_linear_int8(AtenTensorHandle x, AtenTensorHandle values, AtenTensorHandle scale, "
    "AtenTensorHandle bias, int32_t gelu, AtenTensorHandle* out)"
)
INPUT_STEP, MOST_INPUTS, OUTPUT_STEP = 4, 1 << 16, 16  # longer sums of products might leave int32
STATUS = {1: "unsupported size", 2: "no memory for its scratch"}


def supports(inputs: int, outputs: int) -> bool:
    """Whether the kernel takes layers of this size; rows may be any number."""
    return 0 < inputs <= MOST_INPUTS and inputs % INPUT_STEP == 0 and outputs > 0 and outputs % OUTPUT_STEP == 0


@functools.cache
def register() -> Any:
    """Make torch.ops.fastvar.linear_int8 known to this process: for tracing, for loading programs, and for eager use.

    x [M, K] bfloat16, rows contiguous; values [K, N] int8; scale, bias [N] bfloat16 -> [M, N] bfloat16, contiguous:
    (q values) * row_scale * scale + bias, `gelu` applying the tanh form. q is x over row_scale rounded to the nearest
    integer, and row_scale fp32, the largest magnitude of the row / 127. The product is exact; the rest is fp32.
    """
    torch = import_extra("torch", "aotinductor")

    def linear(x: Any, values: Any, scale: Any, bias: Any, gelu: bool) -> Any:
        _check(torch, x, values, scale, bias)
        out = torch.empty((x.shape[0], values.shape[1]), dtype=x.dtype)
        operands = [tensor.data_ptr() for tensor in (values, scale, bias, out)]
        sizes = (x.shape[0], *values.shape)
        status = _function()(x.data_ptr(), x.stride(0), *operands, *sizes, gelu, torch.get_num_threads())
        if status:
            raise RuntimeError(f"{OPERATOR}: {STATUS[status]}")
        return out

    def fake(x: Any, values: Any, scale: Any, bias: Any, gelu: bool) -> Any:
        _check(torch, x, values, scale, bias)
        return x.new_empty((x.shape[0], values.shape[1]))

    operator = torch.library.custom_op(OPERATOR, linear, mutates_args=(), device_types="cpu", schema=SCHEMA)
    operator.register_fake(fake)
    return torch.ops.fastvar.linear_int8.default


def _check(torch: Any, x: Any, values: Any, scale: Any, bias: Any) -> None:
    if x.dim() != 2 or values.dim() != 2 or x.shape[1] != values.shape[0]:
        raise ValueError(f"{OPERATOR}: x {list(x.shape)}, values {list(values.shape)}, expected [M, K] and [K, N]")
    inputs, outputs = values.shape
    if not supports(inputs, outputs):
        raise ValueError(
            f"{OPERATOR} of {inputs} inputs and {outputs} outputs: expected inputs a multiple of {INPUT_STEP} up to "
            f"{MOST_INPUTS}, and outputs of {OUTPUT_STEP}"
        )
    given = {"x": x, "values": values, "scale": scale, "bias": bias}
    for name, tensor in given.items():
        dtype = torch.int8 if name == "values" else torch.bfloat16
        if tensor.dtype != dtype:
            raise ValueError(f"{OPERATOR}: {name} in {tensor.dtype}, expected {dtype}")
        if tensor.dim() == 1 and tensor.shape[0] != outputs:
            raise ValueError(f"{OPERATOR}: {name} {list(tensor.shape)}, expected [{outputs}]")
        contiguous = tensor.stride(-1) == 1 if name == "x" else tensor.is_contiguous()
        if not contiguous:
            raise ValueError(f"{OPERATOR}: {name} with strides {tensor.stride()}, expected contiguous rows")


@functools.cache
def _function() -> Callable[..., int]:
    if lacking := cpu_lacks(LINEAR_INT8):
        raise BackendError(f"{OPERATOR}: this CPU lacks {', '.join(lacking)}", fix="build with --weights int8")
    function = ctypes.CDLL(str(build().library)).fastvar_linear_int8
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, integer, *[pointer] * 4, *[integer] * 3, ctypes.c_int32, ctypes.c_int32]
    function.restype = ctypes.c_int32
    return function
