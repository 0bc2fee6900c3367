"""Restoration of pruned tokens with fewer passes over the whole map than the exported form, which GPUs fuse, takes.

Exported: x + where(kept, fresh, mean of four gathers from the cached map). Here fresh tokens are written over the sum,
in place, and the two columns of corners share the sums of their rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .editor import FLOAT, Rule, constant, folded


def _pattern(
    op: Any, x: Any, fresh: Any, kept: Any, cached: Any, a: Any, b: Any, c: Any, d: Any, unset: Any, numbers: Any
) -> Any:
    """x [L, C] + (fresh [k, C] at the rows `kept` [k, 1], elsewhere the mean of the rows a, b, c, d [L] of `cached`).

    An inverse index, -1 where no row is kept, says which row of `fresh` belongs where.
    """
    inverse = op.ScatterND(unset, kept, numbers)
    placed = op.Gather(fresh, op.Reshape(op.Clip(inverse, 0), [-1]), axis=0)
    first, second, third, fourth = (op.Gather(cached, rows, axis=0) for rows in (a, b, c, d))
    enlarged = op.Mul(op.Add(op.Add(op.Add(first, second), third), fourth), 0.25)
    return op.Add(x, op.Where(op.Unsqueeze(op.GreaterOrEqual(inverse, 0), [-1]), placed, enlarged))


def _is_restoration(context: Any, fresh: Any, unset: Any, numbers: Any, **corners: Any) -> bool:
    empty, order = folded(unset), folded(numbers)
    if fresh.dtype != FLOAT or empty is None or order is None or any(folded(corners[name]) is None for name in "abcd"):
        return False
    return bool((empty == -1).all() and (order == np.arange(len(order))).all())


def _replacement(op: Any, x: Any, fresh: Any, kept: Any, cached: Any, **corners: Any) -> Any:
    def gathered(source: Any, rows: NDArray[Any]) -> Any:
        return op.Gather(source, constant(op, np.ascontiguousarray(rows)), axis=0)

    pairs = np.array([folded(corners[name]) for name in "abcd"]).reshape(2, -1)  # each column's upper and lower row
    distinct, index = np.unique(pairs, axis=1, return_inverse=True)
    left, right = index.reshape(2, -1)
    quarter = op.Mul(cached, constant(op, np.array(1 / 4, np.float32)))
    column = op.Add(*(gathered(quarter, rows) for rows in distinct))
    whole = op.Add(op.Add(gathered(column, left), gathered(column, right)), x)
    return op.ScatterND(whole, kept, op.Add(op.GatherND(x, kept), fresh))  # [k, C]


RULES = (Rule(_pattern, _replacement, _is_restoration),)
