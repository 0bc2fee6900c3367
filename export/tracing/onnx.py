"""Tracing: one step module -> one ONNX graph, with the names of its inputs, outputs and weights."""

from __future__ import annotations

import logging
import math
import warnings
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from ...core.dtypes import BY_ONNX
from ...core.precision import Precision
from ...engines.spec import TensorSpec
from ..models.common.quantise import SCALE, quantise_graph
from ..models.common.rows import border_dtype, topk_operator
from ..models.common.step_graph import (
    StepModule,
    WeightShape,
    WeightShapes,
)
from ..models.common.weights import WeightSource

# The oldest that have all that graphs are made of, whatever newer ones the exporter knows: older libraries run them.
OPSET, IR_VERSION = 23, 10


@dataclass(frozen=True)
class TracedGraph:
    """A graph in the form that its backend reads (engines/base.py), and the tensors at its border."""

    graph: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def layer_weights(sources: dict[str, WeightSource], binding: dict[str, str], layer: int | str = 0) -> WeightShapes:
    """The weights a graph is bound to; those of one layer stand for all layers."""
    found = {name: sources[pattern.format(layer=layer)] for name, pattern in binding.items()}
    return {name: WeightShape(source.shape, source.role) for name, source in found.items()}


def stored_binding(binding: dict[str, str], weights: WeightShapes, precision: Precision) -> dict[str, str]:
    """The binding of the traced graph: a quantised weight has its scales beside it."""
    quantised = [name for name in binding if weights[name].role.is_quantised(precision)]
    return {**binding, **{name + SCALE: binding[name] + SCALE for name in quantised}}


def trace(module: nn.Module, weights: WeightShapes, precision: Precision | None = None) -> TracedGraph:
    """Export a step module to ONNX through torch.export; no shape is dynamic, no weight is inside."""
    precision, step = precision or Precision(), cast(StepModule, module)
    inputs, examples = example_inputs(step, precision), example_weights(weights, precision)
    model = _export(module, tuple(inputs.values()), examples, [*inputs, *examples], list(step.outputs))
    quantised = [name for name, weight in weights.items() if weight.role.is_quantised(precision)]
    if quantised:
        model = quantise_graph(model, quantised, precision)
    return TracedGraph(
        model.SerializeToString(deterministic=True),
        tuple(_spec(value) for value in model.graph.input),
        tuple(_spec(value) for value in model.graph.output),
    )


def example_inputs(step: StepModule, precision: Precision) -> dict[str, Tensor]:
    """Zeros in the shapes and element types that a module takes, without its weights."""
    return {name: example(shape, border_dtype(name, precision)) for name, shape in step.input_shapes().items()}


def example_weights(weights: WeightShapes, precision: Precision) -> dict[str, Tensor]:
    """Zeros for the weights, in the types that a module computes with."""
    return {name: example(weight.shape, weight.role.dtype(precision)) for name, weight in weights.items()}


def example(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Zeros that take no memory: none of their pages is touched, and tracing reads none. torch.zeros touches them all.

    They are no view, as tracing follows views to what they are views of.
    """
    zeros = torch.empty(0, dtype=torch_type(dtype))
    pages = torch.from_numpy(np.zeros(math.prod(shape) * zeros.itemsize, np.uint8)).untyped_storage()
    return zeros.set_(pages, 0, shape)  # type: ignore[call-overload]  # its stub lacks what it takes


def torch_type(name: str) -> torch.dtype:
    """The type of that name in core/dtypes.py."""
    return cast(torch.dtype, getattr(torch, name))


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], weights: dict[str, Tensor], names: list[str], outputs: list[str]
) -> Any:
    for noisy in ("torch.onnx", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad(), topk_operator():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        program = torch.onnx.export(
            module.eval(),
            inputs,
            kwargs={"weights": weights},
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        # Constants folded, as compilers need it; but no fusions: that of RMSNormalization mixes up element types.
        onnxscript.optimizer.optimize_ir(program.model)
    model = program.model_proto
    model.ir_version = IR_VERSION
    _strip(model)
    return model


def _strip(model: Any) -> None:
    """Remove what differs between two exports or names the machine: stack traces, documentation, value shapes."""
    del model.metadata_props[:]
    model.graph.doc_string = ""
    del model.graph.metadata_props[:]
    for item in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    for initializer in model.graph.initializer:
        initializer.doc_string = ""
        del initializer.metadata_props[:]
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def _spec(value: Any) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = BY_ONNX[tensor.elem_type].name
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return TensorSpec(value.name, dtype, shape)
