"""The host arena: one allocation for all buffers of a generation, addressed by the layout's views."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engines.base import TensorRef
from ..engines.dtypes import storage_dtype
from .layout import ALIGNMENT, Layout, View


class HostArena:
    """Memory for one image at a time. Nothing is allocated after construction."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        raw = np.zeros(layout.arena_bytes + ALIGNMENT, dtype=np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self._bytes = raw[start : start + layout.arena_bytes]

    @property
    def size_bytes(self) -> int:
        return self._bytes.nbytes

    def array(self, view: View) -> NDArray[Any]:
        """The tensor itself, writable."""
        offset = self._layout.slots[view.slot].offset + view.start
        return self._bytes[offset : offset + view.size].view(storage_dtype(view.dtype)).reshape(view.shape)

    def ref(self, view: View) -> TensorRef:
        """Where an engine finds the tensor."""
        return TensorRef(self.array(view).ctypes.data, view.dtype, view.shape)
