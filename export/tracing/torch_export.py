"""Tracing for compilers of torch programs: one step module -> one exported program, its sizes open where they can be.

A program returns nothing: its last arguments are the memory that its results go to, so that what calls it needs
neither allocate nor copy. Attention stays one operator, for the compiler to choose a kernel.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from ...core.precision import Precision
from ...engines.aotinductor.operators import INPUT_STEP, LINEAR_INT8, OUTPUT_STEP, register, supports_layer
from ...engines.spec import TensorSpec
from ...errors import BuildError
from ..models.common.quantise import SCALE, IntegerFactor, dequantise
from ..models.common.rows import OpenDims, border_dtype
from ..models.common.step_graph import OpenModule, StepModule, WeightShapes
from .onnx import TracedGraph, example


class Bound(nn.Module):
    """A step module that is given everything at its border in one list: constants, inputs, weights as they are stored,
    and the memory of its results. Constants are the buffers of a module whose sizes are open.
    """

    def __init__(self, module: nn.Module, weights: WeightShapes, precision: Precision) -> None:
        super().__init__()
        self.module, self._step = module, cast(StepModule, module)
        self._weights = weights
        self._quantised = {name for name, weight in weights.items() if weight.role.is_quantised(precision)}
        self._integers = register(LINEAR_INT8) if precision.activations else None
        self._constants = list(constants(module))
        for name in self._constants:
            delattr(module, name)

    def forward(self, *tensors: Tensor) -> None:
        given = iter(tensors)
        for name in self._constants:
            setattr(self.module, name, next(given))
        inputs = [next(given) for _ in self._step.inputs]
        weights = {name: self._weight(name, given) for name in self._weights}
        memory = {name: next(given) for name in self._step.outputs}
        if isinstance(self.module, OpenModule):
            self.module.take_sizes(memory)
        results = self.module(*inputs, weights=weights)
        for target, result in zip(memory.values(), results if isinstance(results, tuple) else (results,), strict=True):
            target.copy_(result)

    def _weight(self, name: str, given: Iterator[Tensor]) -> Tensor | IntegerFactor:
        stored = next(given)
        if name not in self._quantised:
            return stored
        scale = next(given)
        return IntegerFactor(stored, scale, self._integers) if self._integers else dequantise(stored, scale)


def trace_program(module: nn.Module, weights: WeightShapes, precision: Precision | None = None) -> TracedGraph:
    """Export a step module, without its weights; the graph is torch.export's archive.

    Raises:
        BuildError: activations are to be quantised, and a matrix has a size that the kernel does not take.
    """
    precision = precision or Precision()
    if precision.activations:
        _check_sizes(weights, precision)
    for part in module.modules():
        if hasattr(part, "attention"):
            part.attention = fused_attention  # type: ignore[assignment]  # modules take any attribute
    taken, given = border(module, weights, precision)
    own = {name: tensor.clone() for name, tensor in constants(module).items()}
    tensors = own | {spec.name: example(spec.shape, spec.dtype) for spec in (*taken, *given)}
    dims = _dims(module.open_dims(), tensors) if isinstance(module, OpenModule) else [None for _ in tensors]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations
        program = torch.export.export(
            Bound(module.eval(), weights, precision),
            tuple(tensors.values()),
            dynamic_shapes=(tuple(dims),),
        )
        # Saved with the program, and asked for their shapes: one number each is enough.
        program.example_inputs = (tuple(tensor.new_zeros(()).expand(tensor.shape) for tensor in tensors.values()), {})
        archive = io.BytesIO()
        torch.export.save(program, archive)
    return TracedGraph(archive.getvalue(), taken, given)


def _check_sizes(weights: WeightShapes, precision: Precision) -> None:
    for name, weight in weights.items():
        if weight.role.is_quantised(precision) and not supports_layer(weight.shape[1], weight.shape[0]):
            raise BuildError(
                f"--weights w8a8: matrix {name!r} has {weight.shape[0]} outputs and {weight.shape[1]} inputs",
                expected=f"multiples of {OUTPUT_STEP} and {INPUT_STEP}",
                fix="build with --weights int8",
            )


def _dims(opened: OpenDims, tensors: dict[str, Tensor]) -> list[dict[int, Any]]:
    """What torch.export is told of every tensor's dimensions. One that is 1 stays so: it is compiled apart."""
    sizes: dict[str, Any] = {}

    def size(name: str, times: int) -> Any:
        if not name:
            return Dim.AUTO
        found = sizes.setdefault(name, Dim(name, min=2))
        return found if times == 1 else times * found

    return [
        {dim: size(*what) for dim, what in opened.get(name, {}).items() if tensor.shape[dim] > what[1]}
        for name, tensor in tensors.items()
    ]


def border(
    module: Any, weights: WeightShapes, precision: Precision
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What a module takes, weights as they are stored included, and what it gives."""
    shapes = (module.input_shapes(), module.output_shapes())
    taken, given = (tuple(TensorSpec(n, border_dtype(n, precision), s) for n, s in found.items()) for found in shapes)
    return taken + tuple(_stored(weights, precision)), given


def _stored(weights: WeightShapes, precision: Precision) -> Iterator[TensorSpec]:
    """Weights as the weight file holds them: a quantised one has its scales behind it."""
    for name, weight in weights.items():
        role, shape = weight.role, weight.shape
        quantised = role.is_quantised(precision)
        yield TensorSpec(name, role.stored_dtype(precision), shape[::-1] if quantised else shape)
        if quantised:
            yield TensorSpec(name + SCALE, precision.compute, shape[:1])


def constants(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that differ from scale to scale, which a program of open sizes takes from outside, by name."""
    return dict(module.named_buffers()) if isinstance(module, OpenModule) else {}


def constant_arrays(module: nn.Module) -> dict[str, NDArray[Any]]:
    """The same as numpy holds them."""
    return {name: tensor.contiguous().numpy() for name, tensor in constants(module).items()}


def fused_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """rows.attention as one operator: q [k, R * heads, hd] over keys, values [S, R * heads, hd] -> [k * R, C]."""
    q, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (q, keys, values))  # [1, R * heads, ., hd]
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)  # [1, R * heads, 1, S]
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=1.0)
    return out.squeeze(0).transpose(0, 1).reshape(-1, width)
