"""Tools of the rules that rewrite ONNX graphs: what a rule is, how a set of rules is applied, what rules are made of.

A rule is written for `onnxscript.rewriter`, on graphs of `onnx_ir`. Both packages are imported when a rule is applied:
engines are rewritten where they are built, and loaded without either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.platform import import_extra

Shape = tuple[int, ...]
FLOAT = 1  # ONNX's number of fp32
FOLDED = {"Reshape", "Squeeze", "Unsqueeze", "Slice"}


class Rule(NamedTuple):
    """Nodes to find, and those that take their place.

    A rule applies only where no other node reads what lies between the nodes found, and it is no output of the graph.
    """

    pattern: Callable[..., Any]  # (op, *values) -> the value to replace, made by `op` of the named values
    replacement: Callable[..., Any]  # (op, **values) -> the value in its place
    condition: Callable[..., bool]  # (context, **values) -> whether to replace it


def apply(rules: Sequence[Rule], model: Any) -> int:
    """Apply rules to an `onnx_ir.Model`, wherever they fit; returns how many times one did.

    Raises:
        BackendError: onnxscript is not installed.
    """
    pattern, passes = (
        import_extra(name, "export") for name in ("onnxscript.rewriter.pattern", "onnx_ir.passes.common")
    )
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    return int(pattern.RewriteRuleSet([pattern.RewriteRule(*rule) for rule in rules]).apply_to_model(model))


def static_shape(value: Any) -> Shape | None:
    """The shape of a value; None where it is unknown or not static."""
    return tuple(value.shape.numpy()) if value.shape is not None and value.shape.is_static() else None


def folded(value: Any) -> NDArray[Any] | None:
    """The elements of a constant, or of what nodes take from one by reshaping and slicing; None of any other value."""
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    node = value.producer()
    given = {source.name: folded(source) for source in node.inputs} if node and node.op_type in FOLDED else {}
    if not given or any(array is None for array in given.values()):
        return None
    evaluator = import_extra("onnx.reference", "export").ReferenceEvaluator(
        import_extra("onnx_ir", "export").to_proto(node)
    )
    return np.asarray(evaluator.run(None, given)[0])


def constant(op: Any, elements: Any) -> Any:
    """A constant of a numpy array, or of integers in int64."""
    return op.Constant(value=import_extra("onnx_ir", "export").tensor(np.asarray(elements)))


def reshaped(op: Any, x: Any, *shape: int) -> Any:
    """x in another shape."""
    return op.Reshape(x, constant(op, shape))


def sliced(op: Any, x: Any, axis: int, span: tuple[int, int], extent: int) -> Any:
    """The part `span` of an axis of length `extent`; x itself where the part is all of it."""
    if span == (0, extent):
        return x
    return op.Slice(x, *(constant(op, [number]) for number in (*span, axis)))
