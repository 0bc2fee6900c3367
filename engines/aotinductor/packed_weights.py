"""Matrices in the order in which oneDNN's products read them: packed once, not at every product.

oneDNN packs a matrix that lies row by row whenever it multiplies by it: a twentieth of the time where rows are many, a
third where they are few. Results are the same bits, but for products of a single row in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

from ...core.dtypes import size_bytes
from ...core.tensors import TensorRef
from ..scratch_estimates import is_layer
from ..spec import LAYER, EngineSpec, TensorSpec

ROWS = 512  # that a product is expected to have; the order is the same for 2

_Kept = WeakValueDictionary[tuple[int, str, tuple[int, ...]], Any]  # by address, element type and shape
_of_all: _Kept = WeakValueDictionary()  # the newest of each, whoever packed it


class PackedWeights:
    """The packed matrices of one session, whose weights stay where they are while it lasts.

    Sessions that map the same weights share what is packed. Another's is compared with the matrix first: where its
    weights have been, others may lie by now. Launches hold what they use, and nobody else does.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._own: _Kept = WeakValueDictionary()

    def of(self, ref: TensorRef, matrix: Any) -> Any:
        """The packed form of a matrix [N, K] at `ref`."""
        key = ref.address, ref.dtype, ref.shape
        found = self._own.get(key)
        if found is None:
            found = _of_all.get(key)
            if found is None or not self._torch.equal(found.to_dense(), matrix):
                found = _of_all[key] = self._torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS)
            self._own[key] = found
        return found


def packed_bytes(engines: Sequence[EngineSpec], compute: str, layers: int) -> int:
    """Bytes of all matrices of a transformer's layers that may be packed, for `layers` layers computed in a type."""
    named = {spec.weights[tensor.name]: tensor for spec in engines for tensor in _matrices(spec, compute)}
    return sum(size_bytes(t.dtype, t.shape) * (layers if LAYER in name else 1) for name, t in named.items())


def _matrices(spec: EngineSpec, compute: str) -> Iterator[TensorSpec]:
    """Inputs of an engine that may be packed: matrices of a transformer's layer, in the type that is computed in."""
    if is_layer(spec):
        yield from (t for t in spec.inputs if t.name in spec.weights and len(t.shape) == 2 and t.dtype == compute)
