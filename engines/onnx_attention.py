"""Attention as exported, written out in rank 3, in the forms that onnxruntime does best on the CPU.

Over the cache it becomes one operator that keeps no scores. To the text it stays written out, over as many keys as the
longest prompt has: those behind it weigh exactly nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .onnx_editor import GraphEditor

FLOAT = 1  # ONNX's number of fp32
MASKED = -1e20  # a bias below it makes a weight of exactly 0 in fp32
CONTRIBUTED = "com.microsoft"  # onnxruntime's own operators
FUSED_BYTES = 4 << 20  # of scores; below, the written-out form is as fast and the cache holds them


@dataclass(frozen=True)
class WrittenOut:
    """softmax(q @ k + bias) @ v over tensors [tokens, heads, hd], and its nodes from the scores on."""

    query: str
    keys: str
    values: str
    bias: str  # [heads, 1, S], or empty
    nodes: tuple[Any, ...]  # the last one makes the result [tokens, heads, hd]


def rewrite_attention(editor: GraphEditor) -> int:
    """Rewrite every attention; gives how many those were."""
    found = [match for node in editor.nodes if (match := written_out(editor, node)) is not None]
    for match in found:
        if match.bias:
            _shorten(editor, match)
        elif _scores_bytes(editor, match) >= FUSED_BYTES:
            _fuse(editor, match)
    return len(found)


def written_out(editor: GraphEditor, softmax: Any) -> WrittenOut | None:
    """The attention around a softmax, if it is one as export/rows.py writes it, in fp32."""
    if softmax.op_type != "Softmax" or editor.types.get(softmax.input[0]) != FLOAT:
        return None
    biased = editor.maker(softmax.input[0], "Add")
    scores = editor.maker(biased.input[0] if biased is not None else softmax.input[0], "MatMul")
    weighted = editor.only_reader(softmax.output[0], "MatMul")
    back = editor.only_reader(weighted.output[0], "Transpose") if weighted is not None else None
    if scores is None or weighted is None or back is None or weighted.input[0] != softmax.output[0]:
        return None
    expected = [(scores.input[0], [1, 0, 2]), (scores.input[1], [1, 2, 0]), (weighted.input[1], [1, 0, 2])]
    moved = [editor.maker(name, "Transpose") for name, _ in expected]
    if any(n is None or editor.attribute(n, "perm") != p for n, (_, p) in zip(moved, expected, strict=True)):
        return None
    query, keys, values = (node.input[0] for node in moved if node is not None)
    bias = biased.input[1] if biased is not None else ""
    heads, length = editor.shapes[keys][1], editor.shapes[keys][0]
    if (bias and editor.shapes[bias] != (heads, 1, length)) or editor.attribute(back, "perm") != [1, 0, 2]:
        return None
    between = (scores, *([biased] if biased is not None else []), softmax, weighted, back)
    return WrittenOut(query, keys, values, bias, between)


def _scores_bytes(editor: GraphEditor, match: WrittenOut) -> int:
    queries, heads, _ = editor.shapes[match.query]
    return 4 * queries * heads * editor.shapes[match.keys][0]


def _fuse(editor: GraphEditor, match: WrittenOut) -> None:
    """Tokens outermost is, for a batch of one, what the operator takes: nothing has to be moved."""
    _, heads, width = editor.shapes[match.query]
    names = (match.query, match.keys, match.values)
    given = [editor.reshaped(name, 1, editor.shapes[name][0], heads * width) for name in names]
    out = editor.add("MultiHeadAttention", given, domain=CONTRIBUTED, num_heads=heads, scale=1.0)
    *others, last = match.nodes
    editor.add("Reshape", [out, editor.constant(np.array(editor.shapes[match.query]))], last.output[0])
    editor.replace(last, *others)
    editor.require_domain(CONTRIBUTED)


def _shorten(editor: GraphEditor, match: WrittenOut) -> None:
    """The same over the keys up to the last one that any head sees."""
    length = editor.shapes[match.keys][0]
    zero, first, last = (editor.constant(np.array([axis])) for axis in (0, 1, 2))
    seen = editor.add("ReduceMax", [match.bias, editor.constant(np.array([0, 1]))], keepdims=0)  # [S]
    seen = editor.add("Greater", [seen, editor.constant(np.array(MASKED, np.float32))])
    counts = editor.constant(np.arange(1, length + 1))
    count = editor.add("ReduceMax", [editor.add("Where", [seen, counts, first]), zero], keepdims=1)  # [1]
    keys, values = (editor.add("Slice", [name, zero, count, zero]) for name in (match.keys, match.values))
    bias = editor.add("Slice", [match.bias, zero, count, last])
    query = editor.add("Transpose", [match.query], perm=[1, 0, 2])
    scores = editor.add("MatMul", [query, editor.add("Transpose", [keys], perm=[1, 2, 0])])
    weights = editor.add("Softmax", [editor.add("Add", [scores, bias])], axis=-1)
    out = editor.add("MatMul", [weights, editor.add("Transpose", [values], perm=[1, 0, 2])])
    *others, end = match.nodes
    editor.add("Transpose", [out], end.output[0], perm=[1, 0, 2])
    editor.replace(end, *others)
