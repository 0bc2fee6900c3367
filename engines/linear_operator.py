"""The operator fastvar::linear: oneDNN's linear layer for weights that are arguments (kernels/linear.cpp).

It adds the bias, and applies the GELU, while the result is in registers. Torch's own writes the bias first, reads it
back, and runs the GELU over memory again.
"""

from __future__ import annotations

import functools
from typing import Any

from ..packages import import_extra

OPERATOR = "fastvar::linear"
SCHEMA = "(Tensor x, Tensor weight, Tensor bias, bool gelu) -> Tensor"
DECLARATION = (
    "int32_t aoti_torch_cpu_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle bias, "
    "int32_t gelu, AtenTensorHandle* out)"
)


@functools.cache
def register() -> Any:
    """Make torch.ops.fastvar.linear known to this process.

    x [M, K], weight [N, K], bias [N], all of one type -> [M, N] contiguous; `gelu` applies its tanh form.
    """
    torch = import_extra("torch", "aotinductor")

    def linear(x: Any, weight: Any, bias: Any, gelu: bool) -> Any:
        how: tuple[Any, ...] = ("gelu", [], "tanh") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *how)

    def fake(x: Any, weight: Any, bias: Any, gelu: bool) -> Any:
        return x.new_empty((x.shape[0], weight.shape[0]))

    operator = torch.library.custom_op(OPERATOR, linear, mutates_args=(), device_types="cpu", schema=SCHEMA)
    operator.register_fake(fake)
    return torch.ops.fastvar.linear.default
