"""Quantisation: matrices stored in 8 bits with a scale for each output channel.

A pass over a traced graph, and its counterpart over the weights. Where the weights alone are quantised, the product
itself stays in the compute precision: the library fuses the conversion into the matrix product, so that only half
the bytes are read. Where activations are too (torch programs only), linear layers meet an `IntegerFactor`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor

from ....core.dtypes import element_type
from ....core.precision import Precision
from ....errors import InternalError
from .weights import Role, WeightSource

SCALE = ".scale"  # behind a matrix's name
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


def quantise_sources(sources: Mapping[str, WeightSource], precision: Precision) -> dict[str, WeightSource]:
    """Every matrix that the precision stores quantised as two tensors: values [inputs, outputs], scales [outputs]."""
    stored: dict[str, WeightSource] = {}
    for name, source in sources.items():
        if not source.role.is_quantised(precision):
            stored[name] = source
            continue
        outputs, inputs = source.shape
        stored[name] = WeightSource((inputs, outputs), _values(source, precision), source.role)
        stored[name + SCALE] = WeightSource((outputs,), _scales(source, precision), Role.COMPUTE)
    return stored


def quantise(matrix: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """A matrix [outputs, inputs] as values [inputs, outputs] and scales [outputs] in the compute precision.

    Values are made for the scales as they are stored: rounding a scale afterwards would shift its whole channel.
    What is not finite stays so in the scale, where the writer of the weights finds it.
    """
    largest = LARGEST[precision.weights]
    matrix = matrix.float()
    scale = scales_of(matrix, precision)
    values = (matrix / scale.float()[:, None]).clamp(-largest, largest).t().contiguous()
    if precision.weights == "int8":
        return values.round().to(torch.int8), scale
    return values.to(torch.float8_e4m3fn), scale


def scales_of(matrix: Tensor, precision: Precision) -> Tensor:
    """The scales alone of a matrix [outputs, inputs]: one for each output channel."""
    largest = matrix.float().abs().amax(dim=1)
    scale = _rounded_up(largest / LARGEST[precision.weights], getattr(torch, precision.compute))
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # an empty channel


def _rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In another type, and never smaller: the largest weight of a channel must not be cut, nor its scale vanish."""
    rounded = scale.to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    above = (rounded.view(bits) + 1).view(dtype)  # of positive numbers the next one up
    return torch.where(rounded.float() < scale, above, rounded)


def dequantise(values: Tensor, scale: Tensor) -> Tensor:
    """The matrix [outputs, inputs] that a quantised one stands for, in the precision of its scales."""
    return (values.to(scale.dtype) * scale).t()


def integer_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """What fastvar::linear_int8 computes, by plain torch: x [M, K], values [K, N] int8, scale and bias [N] -> [M, N].

    Every row of x becomes integers up to 127 by its own scale. The product is exact, the rest fp32, and the result is
    rounded to the type of x once. Rows whose largest magnitude is below 1e-30 count as zeros.
    """
    largest = x.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    quantised = (x.float() * (torch.full_like(largest, LARGEST["int8"]) / largest)).round()
    product = (quantised.double() @ values.double()).float()
    out = product * (largest / LARGEST["int8"]) * scale.float() + bias.float()
    return (F.gelu(out, approximate="tanh") if gelu else out).to(x.dtype)


@dataclass(frozen=True)
class IntegerFactor:
    """Stands for a quantised weight [outputs, inputs] where a step module calls F.linear: `linear` is called instead.

    `linear` takes (x, values, scale, bias, gelu). Modules ask a weight for nothing but its type and this product.
    """

    values: Tensor
    scale: Tensor
    linear: Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations that it is multiplied with, before they are quantised."""
        return self.scale.dtype

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not F.linear or kwargs or len(args) != 3 or not isinstance(args[1], cls):
            raise InternalError(f"a weight with quantised activations is given to {function}, expected F.linear")
        x, weight, bias = args
        return weight.linear(x, weight.values, weight.scale, bias, False)


def quantise_graph(model: Any, names: Sequence[str], precision: Precision) -> Any:
    """Replace the weight inputs `names` by quantised ones, each with its scales as an input behind it.

    Requires every one of them to be the transposed second factor of one Gemm. Ensures that the graph's other
    inputs, its outputs and their order are as before.
    """
    compute, stored = element_type(precision.compute).onnx, element_type(precision.weights).onnx
    graph, nodes, inputs = model.graph, [], []
    uses = Counter(name for node in graph.node for name in node.input)
    for name in names:
        if uses[name] != 1:
            raise InternalError(f"weight {name!r} is used {uses[name]} times, expected once")
    for node in graph.node:
        for name in set(names).intersection(node.input):
            nodes.append(_dequantising(node, name))
        nodes.append(node)
    for value in graph.input:
        if value.name not in names:
            inputs.append(value)
            continue
        outputs, width = (d.dim_value for d in value.type.tensor_type.shape.dim)
        inputs.append(helper.make_tensor_value_info(value.name, stored, [width, outputs]))
        inputs.append(helper.make_tensor_value_info(value.name + SCALE, compute, [outputs]))
    changed = helper.make_graph(
        nodes, graph.name, inputs, list(graph.output), list(graph.initializer), value_info=list(graph.value_info)
    )
    return helper.make_model(
        changed, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )


def _dequantising(node: Any, name: str) -> Any:
    """The node that goes before; the Gemm is changed to read it."""
    transposed = {a.name: helper.get_attribute_value(a) for a in node.attribute}.get("transB")
    if node.op_type != "Gemm" or list(node.input).index(name) != 1 or transposed != 1:
        raise InternalError(f"weight {name!r} is not the transposed factor of a Gemm but of {node.op_type}")
    for attribute in node.attribute:
        if attribute.name == "transB":
            attribute.i = 0
    node.input[1] = f"{name}.dequantised"
    return helper.make_node("DequantizeLinear", [name, name + SCALE], [node.input[1]], f"dequantise_{name}", axis=1)


def _values(source: WeightSource, precision: Precision) -> Any:
    return lambda: quantise(source.fetch(), precision)[0]


def _scales(source: WeightSource, precision: Precision) -> Any:
    return lambda: scales_of(source.fetch(), precision)
