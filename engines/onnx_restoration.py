"""Restoration of pruned tokens with fewer passes over the whole map than the exported form, which GPUs fuse, takes.

Exported: x + where(kept, fresh, mean of four gathers from the cached map). Here fresh tokens are written over the sum,
in place, and the two columns of corners share the sums of their rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .onnx_editor import GraphEditor

FLOAT = 1  # ONNX's number of fp32
CORNERS = 4


@dataclass(frozen=True)
class Restored:
    """x [L, C] + (fresh [k, C] at the rows `kept` [k], elsewhere the mean of four rows of `cached` by `corners`)."""

    x: str
    fresh: str
    kept: str  # as indices [k, 1]
    cached: str
    corners: NDArray[np.int64]  # [4, L]
    nodes: tuple[Any, ...]  # the last one makes the sum


def rewrite_restorations(editor: GraphEditor) -> int:
    """Rewrite every restoration; gives how many those were."""
    found = [match for node in editor.nodes if (match := restored(editor, node)) is not None]
    for match in found:
        _rewrite(editor, match)
    return len(found)


def restored(editor: GraphEditor, where: Any) -> Restored | None:
    """The restoration around a Where, if it is one as export/rows.py writes it, in fp32."""
    if where.op_type != "Where" or editor.types.get(where.output[0]) != FLOAT:
        return None
    total = editor.only_reader(where.output[0], "Add")
    fresh = editor.maker(where.input[1], "Gather")
    kept = _kept(editor, where.input[0])
    enlarged = _enlarged(editor, where.input[2])
    if total is None or fresh is None or not kept or enlarged is None or total.input[1] != where.output[0]:
        return None
    cached, corners = enlarged
    return Restored(total.input[0], fresh.input[0], kept, cached, corners, (where, fresh, total))


def _kept(editor: GraphEditor, condition: str) -> str:
    """The indices [k, 1] that a mask [L, 1] is true at, by way of the inverse index."""
    unsqueezed = editor.maker(condition, "Unsqueeze")
    at_least = editor.maker(unsqueezed.input[0], "GreaterOrEqual") if unsqueezed is not None else None
    scatter = editor.maker(at_least.input[0], "ScatterND") if at_least is not None else None
    if scatter is None:
        return ""
    empty, numbers = editor.value(scatter.input[0]), editor.value(scatter.input[2])
    if empty is None or numbers is None or (empty != -1).any() or (numbers != np.arange(len(numbers))).any():
        return ""
    return str(scatter.input[1])


def _enlarged(editor: GraphEditor, name: str) -> tuple[str, NDArray[np.int64]] | None:
    """The map that four gathers read, and the rows they take: [4, L]."""
    mean = editor.maker(name, "Mul")
    quarter = editor.value(mean.input[1]) if mean is not None else None
    if mean is None or quarter is None or quarter.size != 1 or float(quarter) != 1 / CORNERS:
        return None
    gathers: list[Any] = []
    rest = mean.input[0]
    while (add := editor.maker(rest, "Add")) is not None:
        gathers.insert(0, editor.maker(add.input[1], "Gather"))
        rest = add.input[0]
    gathers.insert(0, editor.maker(rest, "Gather"))
    taken = [None if gather is None else editor.folded(gather.input[1]) for gather in gathers]
    sources = {gather.input[0] for gather in gathers if gather is not None}
    if len(gathers) != CORNERS or len(sources) != 1 or any(index is None for index in taken):
        return None
    return sources.pop(), np.stack([index for index in taken if index is not None])


def _rewrite(editor: GraphEditor, match: Restored) -> None:
    pairs = np.concatenate((match.corners[[0, 2]], match.corners[[1, 3]]), axis=1)  # each column's upper and lower row
    distinct, index = np.unique(pairs, axis=1, return_inverse=True)
    left, right = index.reshape(2, -1)
    quarter = editor.add("Mul", [match.cached, editor.constant(np.array(1 / CORNERS, np.float32))])
    upper, lower = (_gathered(editor, quarter, rows) for rows in distinct)
    column = editor.add("Add", [upper, lower])
    enlarged = editor.add("Add", [_gathered(editor, column, left), _gathered(editor, column, right)])
    whole = editor.add("Add", [enlarged, match.x])
    at_kept = editor.add("GatherND", [match.x, match.kept])  # [k, C]
    *others, total = match.nodes
    editor.add("ScatterND", [whole, match.kept, editor.add("Add", [at_kept, match.fresh])], total.output[0])
    editor.replace(total, *others)


def _gathered(editor: GraphEditor, x: str, rows: NDArray[np.int64]) -> str:
    return editor.add("Gather", [x, editor.constant(np.ascontiguousarray(rows))], axis=0)
