"""Group norms as one scale and one shift of every channel: onnxruntime would write the tensor out for each step.

Knows fp32 graphs with GroupNormalization, as export/ traces them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .onnx_editor import GraphEditor

FLOAT = 1  # ONNX's number of fp32
PART_BYTES = 8 << 20  # of a tensor whose moments are taken at a time


def rewrite_group_norms(editor: GraphEditor) -> int:
    """Rewrite every group norm that channels are scaled and shifted behind; gives how many those were."""
    found = [node for node in editor.nodes if node.op_type == "GroupNormalization"]
    return sum(_rewrite(editor, node) for node in found)


def _rewrite(editor: GraphEditor, norm: Any) -> bool:
    """norm(x) * gamma + beta, where gamma and beta [1, C, 1, 1] belong to channels -> x * scale + shift."""
    x, (own_scale, own_shift) = norm.input[0], norm.input[1:3]
    scaled = editor.only_reader(norm.output[0], "Mul")
    shifted = editor.only_reader(scaled.output[0], "Add") if scaled is not None else None
    if scaled is None or shifted is None or editor.types.get(x) != FLOAT:
        return False
    batch, channels, *_ = editor.shapes[x]
    gamma, beta = scaled.input[1], shifted.input[1]
    if batch != 1 or any(editor.shapes.get(name) != (1, channels, 1, 1) for name in (gamma, beta)):
        return False
    mean, deviation = _moments(editor, x, editor.attribute(norm, "num_groups"), editor.attribute(norm, "epsilon", 1e-5))
    column = editor.constant(np.array([1, channels, 1, 1]))
    own_scale, own_shift = (editor.add("Reshape", [name, column]) for name in (own_scale, own_shift))
    scale = editor.add("Mul", [editor.add("Div", [own_scale, deviation]), gamma])
    shift = editor.add("Add", [editor.add("Mul", [own_shift, gamma]), beta])
    shift = editor.add("Sub", [shift, editor.add("Mul", [mean, scale])])
    editor.shapes |= dict.fromkeys((scale, shift), (1, channels, 1, 1))
    editor.add("Add", [editor.add("Mul", [x, scale]), shift], shifted.output[0])
    editor.replace(shifted, norm, scaled)
    return True


def _moments(editor: GraphEditor, x: str, groups: int, epsilon: float) -> tuple[str, str]:
    """Mean and standard deviation of each channel's group, [1, C, 1, 1].

    By deviations from the mean, for squares cancel; some groups at a time, so that deviations stay in the cache.
    """
    _, channels, *size = editor.shapes[x]
    each = channels // groups * math.prod(size)
    rows = editor.add("Reshape", [x, editor.constant(np.array([groups, each]))])
    at_once = max(1, PART_BYTES // (4 * each))
    axis = editor.constant(np.array([1]))
    means, variances = [], []
    for first in range(0, groups, at_once):
        part = editor.sliced(rows, 0, (first, min(first + at_once, groups)), groups)
        means.append(editor.add("ReduceMean", [part, axis], keepdims=1))  # [groups of this part, 1]
        apart = editor.add("Sub", [part, means[-1]])
        variances.append(editor.add("ReduceMean", [editor.add("Mul", [apart, apart]), axis], keepdims=1))
    variance = editor.add("Add", [_joined(editor, variances), editor.constant(np.array(epsilon, np.float32))])
    repeats, column = (editor.constant(np.array(shape)) for shape in ((1, channels // groups), (1, channels, 1, 1)))
    mean, deviation = (
        editor.add("Reshape", [editor.add("Tile", [one, repeats]), column])
        for one in (_joined(editor, means), editor.add("Sqrt", [variance]))
    )
    return mean, deviation


def _joined(editor: GraphEditor, parts: list[str]) -> str:
    return editor.add("Concat", parts, axis=0) if len(parts) > 1 else parts[0]
