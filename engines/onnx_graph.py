"""ONNX graphs before a library sees them: checked, every node named, without the exporter's notes.

Every graph is cleaned first: parsers accept some broken graphs in silence, empty bytes and unknown operator sets say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..core.platform import import_extra
from ..errors import BuildError


def clean_graph(graph: bytes) -> bytes:
    """An ONNX graph, checked, every node named, without notes; equal graphs give equal bytes.

    Raises:
        BackendError: onnx is not installed.
        BuildError: not ONNX, invalid, or without inputs or outputs.
    """
    onnx, decode_error = import_onnx()
    try:
        model = onnx.load_model_from_string(graph)
        _check_names(model.graph)
        for position, node in enumerate(model.graph.node):
            node.name = node.name or f"{node.op_type}_{position}"  # for errors to name
        onnx.checker.check_model(model, full_check=True)
    except (decode_error, onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise BuildError(f"not a valid ONNX graph: {error}") from error
    known = onnx.defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > known:
            raise BuildError(
                f"the graph uses ONNX opset {opset.version}",
                expected=f"at most {known}, the newest that the installed onnx knows",
                fix="update onnx, or export with an older opset",
            )
    for kind, values in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        if not values:
            raise BuildError(f"the graph {model.graph.name!r} has no {kind}", expected="at least one of each")
    model.producer_name = model.producer_version = ""
    for part in _annotated(model):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    return bytes(model.SerializeToString(deterministic=True))


def _check_names(graph: Any) -> None:
    """Refuse names that are no text, which protobuf gives as bytes: the bindings of the compilers crash on them.

    Raises:
        ValueError: a tensor has such a name.
    """
    values = (value.name for value in (*graph.input, *graph.output, *graph.initializer))
    used = (name for node in graph.node for name in (*node.input, *node.output))
    for name in (*values, *used):
        if not isinstance(name, str):
            raise ValueError(f"the name {name!r} of a tensor is not UTF-8")


def check_static(name: str, shape: Sequence[Any]) -> None:
    """Refuse a shape that is not static: libraries give an open size as a name, or as a negative number.

    Raises:
        BuildError: a size is open.
    """
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise BuildError(
            f"tensor {name!r} has shape {list(shape)}",
            expected="a static shape",
            fix="export without dynamic axes",
        )


def import_onnx() -> tuple[Any, type[Exception]]:
    """The package onnx, and the error that its parser raises.

    Raises:
        BackendError: onnx is not installed.
    """
    parts = ("onnx", "onnx.checker", "onnx.defs", "onnx.shape_inference", "google.protobuf.message")
    onnx, *_, message = (import_extra(name, "export") for name in parts)
    return onnx, message.DecodeError


def _annotated(model: Any) -> Iterator[Any]:
    """Every part of a model that can carry notes."""
    graph = model.graph
    yield from (model, graph, *model.functions)
    yield from (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for function in model.functions:
        yield from (*function.node, *function.value_info)
