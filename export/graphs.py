"""Tracing: one step module -> one ONNX graph, with the names of its inputs, outputs and weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import warnings
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

import onnxscript.optimizer
import torch
from torch import Tensor, nn

from ..engines.dtypes import BY_ONNX
from ..engines.manifest import TensorSpec
from ..precision import Precision
from ..provenance import source_digest
from .quantise import SCALE, quantise_graph
from .rows import OpenDims, Shapes, border_dtype, topk_operator
from .weights import Role, WeightSource

# The oldest that have all that graphs are made of, whatever newer ones the exporter knows: older libraries run them.
OPSET, IR_VERSION = 23, 10
MAKERS = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers", "numpy")  # libraries that shape a graph


@dataclass(frozen=True)
class WeightShape:
    """A weight as a module takes it, before it is quantised."""

    shape: tuple[int, ...]
    role: Role


WeightShapes = dict[str, WeightShape]


class StepModule(Protocol):
    """What a module must offer to be traced; `attentions`, where it has any, counts what a compiler must fuse.

    `output_shapes` says beforehand what tracing will find: so a plan needs no graph. A module that is an `OpenModule`
    besides can be traced once for all scales.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]

    def input_shapes(self) -> Shapes: ...

    def output_shapes(self) -> Shapes: ...


@runtime_checkable
class OpenModule(Protocol):
    """A step module whose sizes may be left open: it finds them in the shapes of its tensors, not in its arguments.

    `open_dims` says which dimensions change from scale to scale, of tensors at the border and of buffers, which then
    come from outside like inputs: each as a named size times a number, or as ANY size. `stand_in` gives arguments of
    the same kind in sizes that stand for all others: small, all different, and one where they were one, for compilers
    treat a size of one apart.
    """

    def open_dims(self) -> OpenDims: ...

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]: ...

    def take_sizes(self, memory: dict[str, Tensor]) -> None:
        """Before a forward: sizes that only the memory of the results knows."""


@dataclass(frozen=True)
class StepGraph:
    """A graph to trace: a module class with its arguments, and the weights it is bound to.

    `prefix` goes before the module's weight names in weights.safetensors; it may hold "{layer}". The weights of `layer`
    stand for those of all layers that the graph serves.
    """

    name: str
    factory: type[nn.Module]
    arguments: dict[str, Any]
    prefix: str
    layer: int | str = 0

    def weight_binding(self, module: StepModule) -> dict[str, str]:
        """Names in weights.safetensors, before quantisation."""
        return {name: self.prefix + name for name in module.weights}

    def stand_in(self) -> StepGraph:
        """The graph that stands for this one and for all others of its kind; itself where its sizes are fixed."""
        if not hasattr(self.factory, "stand_in"):
            return self
        factory = cast("type[OpenModule]", self.factory)
        return replace(self, name=self.factory.__name__.lower(), arguments=factory.stand_in(self.arguments))

    def key(self, weights: WeightShapes, precision: Precision) -> str:
        """Digest of all that the graph depends on: arguments, weights, precision, our source and others' versions."""
        content = {
            "kind": f"{self.factory.__module__}.{self.factory.__qualname__}",
            "arguments": {name: _plain(value) for name, value in self.arguments.items()},
            "weights": {name: [weight.shape, weight.role.value] for name, weight in weights.items()},
            "precision": asdict(precision),
            "source": source_digest(self.factory.__module__, __name__),
            "makers": maker_versions(),
            "opset": [OPSET, IR_VERSION],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class TracedGraph:
    """A graph in the form that its backend reads (engines/base.py), and the tensors at its border."""

    graph: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@cache
def maker_versions() -> dict[str, str]:
    """Versions of the libraries that shape a graph; empty for one that is not installed."""
    return {name: _version(name) for name in MAKERS}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


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
    return {name: _example(name, shape, precision) for name, shape in step.input_shapes().items()}


def example_weights(weights: WeightShapes, precision: Precision) -> dict[str, Tensor]:
    """Zeros for the weights, in the types that a module computes with."""
    return {n: torch.zeros(w.shape, dtype=torch_type(w.role.dtype(precision))) for n, w in weights.items()}


def _example(name: str, shape: tuple[int, ...], precision: Precision) -> Tensor:
    return torch.zeros(shape, dtype=torch_type(border_dtype(name, precision)))


def torch_type(name: str) -> torch.dtype:
    """The type of that name in engines/dtypes.py."""
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


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "to_dict"):
        return {k: v for k, v in value.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return value
