"""The operator fastvar::attention, and the C++ kernel behind it (kernels/attention.cpp), for bfloat16 on CPUs.

Engines link the kernel statically: they hold it, and call it without Python. Eager torch calls it through ctypes.
Knows no backend and no model. Torch is imported when an operator is asked for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from ..errors import BackendError
from ..packages import import_extra
from .native import ATTENTION, build, cpu_lacks

OPERATOR = "fastvar::attention"
SCHEMA = "(Tensor q, Tensor keys, Tensor values, Tensor? bias) -> Tensor"
DECLARATION = (
    "int32_t aoti_torch_cpu_attention(AtenTensorHandle q, AtenTensorHandle keys, AtenTensorHandle values, "
    "AtenTensorHandle* bias, AtenTensorHandle* out)"
)
LARGEST_HEAD, HEAD_STEP = 256, 16
STATUS = {1: "unsupported head size", 2: "no keys", 3: "no memory for its scratch"}


def supports(head_dim: int, dtype: str = "bfloat16") -> bool:
    """Whether the kernel takes heads of this size; a program with others keeps torch's own attention."""
    return dtype == "bfloat16" and 0 < head_dim <= LARGEST_HEAD and head_dim % HEAD_STEP == 0


@functools.cache
def register() -> Any:
    """Make torch.ops.fastvar.attention known to this process: for tracing, for loading programs, and for eager use.

    q [L, heads, head_dim], keys and values [S, heads, head_dim], all bfloat16; bias [heads, 1, S] fp32 or None, finite:
    about -1e30 masks a key. Token and head strides are free, so prefixes and slices of a cache are read in place.
    -> [L, heads, head_dim] contiguous. The queries are scaled beforehand.
    """
    torch = import_extra("torch", "aotinductor")

    def attention(q: Any, keys: Any, values: Any, bias: Any) -> Any:
        _check(torch, q, keys, values, bias)
        out = torch.empty(q.shape, dtype=q.dtype)
        strides = [(ctypes.c_int64 * 2)(*tensor.stride()[:2]) for tensor in (q, keys, values)]
        masked = (0, 0) if bias is None else (bias.data_ptr(), bias.stride(0))
        operands = [item for t, s in zip((q, keys, values), strides, strict=True) for item in (t.data_ptr(), s)]
        sizes = (q.shape[0], keys.shape[0], *q.shape[1:])
        status = _function()(*operands, *masked, out.data_ptr(), *sizes, torch.get_num_threads())
        if status:
            raise RuntimeError(f"{OPERATOR}: {STATUS[status]}")
        return out

    def fake(q: Any, keys: Any, values: Any, bias: Any) -> Any:
        _check(torch, q, keys, values, bias)
        return q.new_empty(q.shape)

    operator = torch.library.custom_op(OPERATOR, attention, mutates_args=(), device_types="cpu", schema=SCHEMA)
    operator.register_fake(fake)
    return torch.ops.fastvar.attention.default


def _check(torch: Any, q: Any, keys: Any, values: Any, bias: Any) -> None:
    heads, head_dim = q.shape[1:]
    if not supports(head_dim):
        raise ValueError(f"{OPERATOR} of heads of {head_dim}: expected a multiple of {HEAD_STEP} up to {LARGEST_HEAD}")
    if keys.shape != values.shape or tuple(keys.shape[1:]) != (heads, head_dim) or keys.shape[0] < 1:
        raise ValueError(f"{OPERATOR}: q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)}")
    if bias is not None and (tuple(bias.shape) != (heads, 1, keys.shape[0]) or bias.dtype != torch.float32):
        raise ValueError(f"{OPERATOR}: bias {list(bias.shape)} {bias.dtype}, expected [heads, 1, S] in float32")
    for tensor in (q, keys, values):
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"{OPERATOR} on {tensor.dtype}: expected torch.bfloat16")
    for tensor in (q, keys, values, bias):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{OPERATOR}: strides {tensor.stride()}, expected a contiguous last axis")


@functools.cache
def _function() -> Callable[..., int]:
    if lacking := cpu_lacks(ATTENTION):
        raise BackendError(f"{OPERATOR}: this CPU lacks {', '.join(lacking)}", fix="use scaled_dot_product_attention")
    function = ctypes.CDLL(str(build().library)).fastvar_attention
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [*[pointer] * 7, integer, pointer, *[integer] * 4, ctypes.c_int32]
    function.restype = ctypes.c_int32
    return function
