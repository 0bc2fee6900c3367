"""An ONNX graph while it is rewritten: who makes and who reads each tensor, shapes, and nodes that take others' place.

Knows no pattern and no library that runs graphs.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
FOLDED = {"Reshape", "Squeeze", "Unsqueeze", "Slice"}
NEW = "rewritten_"  # how the names of new tensors and nodes begin


class GraphEditor:
    """One model with static shapes. New nodes go where the node stands that they replace, so the order stays right."""

    def __init__(self, onnx: Any, model: Any) -> None:
        self._onnx, self._model = onnx, model
        self._helper = importlib.import_module("onnx.helper")
        self._arrays = importlib.import_module("onnx.numpy_helper")
        graph = onnx.shape_inference.infer_shapes(model).graph
        self.shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.types: dict[str, int] = {tensor.name: tensor.data_type for tensor in graph.initializer}
        for value in (*graph.input, *graph.output, *graph.value_info):
            tensor = value.type.tensor_type
            self.shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
            self.types[value.name] = tensor.elem_type
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.inputs = {value.name for value in model.graph.input}
        self.outputs = {value.name for value in model.graph.output}
        self.nodes: list[Any] = list(model.graph.node)
        self._constants: dict[tuple[str, Shape, bytes], str] = {}
        self._pending: list[Any] = []
        self._count = 0
        self.changed = False
        self._index()

    def _index(self) -> None:
        self._makers = {name: node for node in self.nodes for name in node.output}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self._readers[name].append(node)

    def maker(self, name: str, *operators: str) -> Any | None:
        """The node that makes a tensor, if it is one of these operators."""
        node = self._makers.get(name)
        return node if node is not None and node.op_type in operators else None

    def read_by(self, name: str, count: int) -> bool:
        """Whether so many nodes read a tensor, and nobody outside the graph."""
        return len(self._readers[name]) == count and name not in self.outputs

    def only_reader(self, name: str, *operators: str) -> Any | None:
        """The node that reads a tensor which nothing else reads, if it is one of these operators."""
        if not self.read_by(name, 1) or self._readers[name][0].op_type not in operators:
            return None
        return self._readers[name][0]

    def attribute(self, node: Any, name: str, default: Any = None) -> Any:
        found = (self._helper.get_attribute_value(a) for a in node.attribute if a.name == name)
        return next(found, default)

    def value(self, name: str) -> NDArray[Any] | None:
        """The numbers of a constant; None for what is computed or given."""
        array: NDArray[Any] | None = self._arrays.to_array(self._stored[name]) if name in self._stored else None
        return array

    def folded(self, name: str) -> NDArray[Any] | None:
        """The numbers of a constant, or of what nodes take from one by reshaping and slicing; else None."""
        node = self._makers.get(name)
        if node is None:
            return self.value(name)
        given = [self.folded(source) for source in node.input]
        if node.op_type not in FOLDED or any(array is None for array in given):
            return None
        evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(node)
        results: list[NDArray[Any]] = evaluator.run(None, dict(zip(node.input, given, strict=True)))
        return results[0]

    def constant(self, array: NDArray[Any]) -> str:
        """The name of a constant; equal ones are stored once."""
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{NEW}constant_{len(self._constants)}"
            tensor = self._arrays.from_array(array, name)
            self._model.graph.initializer.append(tensor)
            self._stored[name], self.shapes[name], self.types[name] = tensor, array.shape, tensor.data_type
            self._constants[key] = name
        return self._constants[key]

    def add(self, operator: str, inputs: Sequence[str], output: str = "", domain: str = "", **attributes: Any) -> str:
        """A new node, to be placed by `replace`; gives the name of its output."""
        self._count += 1
        output = output or f"{NEW}{self._count}"
        name = f"{NEW}{operator}_{self._count}"
        self._pending.append(
            self._helper.make_node(operator, list(inputs), [output], name, domain=domain, **attributes)
        )
        return output

    def reshaped(self, x: str, *shape: int) -> str:
        return self.add("Reshape", [x, self.constant(np.array(shape))])

    def sliced(self, x: str, axis: int, span: tuple[int, int], extent: int) -> str:
        """A part of an axis that is `extent` long; x itself where that is all of it."""
        if span == (0, extent):
            return x
        start, end, axes = (self.constant(np.array([number])) for number in (*span, axis))
        return self.add("Slice", [x, start, end, axes])

    def replace(self, node: Any, *further: Any) -> None:
        """The nodes added last in place of `node`; `further` ones vanish as well, for nothing reads them any more."""
        place = next(position for position, other in enumerate(self.nodes) if other is node)
        gone = {id(other) for other in (node, *further)}
        before, behind = self.nodes[:place], self.nodes[place + 1 :]
        self.nodes = [n for n in (*before, *self._pending, *behind) if id(n) not in gone]
        self._pending = []
        self.changed = True
        self._index()

    def require_domain(self, domain: str, version: int = 1) -> None:
        if all(opset.domain != domain for opset in self._model.opset_import):
            self._model.opset_import.append(self._helper.make_opsetid(domain, version))

    def finished(self) -> Any:
        """The model with its new nodes, without constants and nodes that nothing reads."""
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        graph = self._model.graph
        del graph.node[:]
        graph.node.extend(reversed(kept))
        constants = [tensor for tensor in graph.initializer if tensor.name in needed]
        del graph.initializer[:]
        graph.initializer.extend(constants)
        made = {name for node in kept for name in node.output}
        values = [value for value in graph.value_info if value.name in made]
        del graph.value_info[:]
        graph.value_info.extend(values)
        return self._model
