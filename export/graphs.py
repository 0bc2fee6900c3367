"""Tracing: one step module -> one ONNX graph, with the names of its inputs, outputs and weights."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import onnx
import onnxscript
import torch
from torch import Tensor, nn

from ..engines.manifest import TensorSpec
from .rows import Shapes
from .weights import WeightSource

OPSET = 23
INTEGER_INPUTS = {"kept", "ids", "attention_mask"}  # int64; all other activations are fp32


class StepModule(Protocol):
    """What a module must offer to be traced."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]

    def input_shapes(self) -> Shapes: ...


@dataclass(frozen=True)
class StepGraph:
    """A graph to trace: a module class with its arguments, and the weights it is bound to.

    `prefix` goes before the module's weight names in weights.safetensors; it may hold "{layer}".
    """

    name: str
    factory: Callable[..., nn.Module]
    arguments: dict[str, Any]
    prefix: str

    def weight_binding(self, module: StepModule) -> dict[str, str]:
        return {name: self.prefix + name for name in module.weights}

    def key(self, weight_shapes: Shapes) -> str:
        """Digest of all that the graph depends on: arguments, weight shapes, exporter source and versions."""
        content = {
            "kind": self.factory.__qualname__,
            "arguments": {name: _plain(value) for name, value in self.arguments.items()},
            "weights": weight_shapes,
            "exporter": exporter_digest(),
            "opset": OPSET,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class TracedGraph:
    """ONNX bytes and the tensors at its border."""

    onnx: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@cache
def exporter_digest() -> str:
    """Digest of the exporter's source and of the libraries that shape a graph."""
    digest = hashlib.sha256("|".join((torch.__version__, onnx.__version__, onnxscript.__version__)).encode())
    root = Path(__file__).parent
    for source in (*sorted(root.glob("*.py")), root.parent / "rotary.py"):
        if source.name not in (
            "checkpoint.py",
            "random_weights.py",
            "build.py",
            "factory.py",
            "reference.py",
            "pruning.py",
        ):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def layer_weights(sources: dict[str, WeightSource], binding: dict[str, str]) -> Shapes:
    """Shapes of the tensors a graph is bound to; those of layer 0 stand for all layers."""
    return {name: sources[pattern.format(layer=0)].shape for name, pattern in binding.items()}


def trace(module: nn.Module, weight_shapes: Shapes) -> TracedGraph:
    """Export a step module through torch.export; no shape is dynamic, no weight is inside."""
    step = cast(StepModule, module)
    inputs = tuple(_example(name, shape) for name, shape in step.input_shapes().items())
    weights = {name: torch.zeros(shape) for name, shape in weight_shapes.items()}
    names = [*step.input_shapes(), *weights]
    model = _export(module, inputs, weights, names, list(step.outputs))
    return TracedGraph(
        model.SerializeToString(deterministic=True),
        tuple(_spec(value) for value in model.graph.input),
        tuple(_spec(value) for value in model.graph.output),
    )


def _example(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64 if name in INTEGER_INPUTS else torch.float32)


def _export(
    module: nn.Module, inputs: tuple[Tensor, ...], weights: dict[str, Tensor], names: list[str], outputs: list[str]
) -> Any:
    for noisy in ("torch.onnx", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of its own deprecations
        program = torch.onnx.export(
            module.eval(),
            inputs,
            kwargs={"weights": weights},
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
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
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    return TensorSpec(value.name, dtype, shape)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "to_dict"):
        return {k: v for k, v in value.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return value
