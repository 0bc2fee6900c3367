"""All memory of a pipeline on one device: one allocation, of the weights that stay and of an arena behind them.

The arena serves every kind of pass in turn: they are drawn one at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from ...core.tensors import Scratch, TensorRef
from ...engines.device import Allocation, Device
from .layout import Binding, Layout, View, WeightView
from .placement import aligned

_log = logging.getLogger(__name__)


class Weights(Protocol):
    """The memory-mapped weight file."""

    def __getitem__(self, name: str) -> NDArray[Any]: ...

    def ref(self, name: str) -> TensorRef: ...


class Memory:
    """Places weights and arena, and turns bindings into addresses. Nothing is allocated after construction,
    unless an engine wants more scratch memory than its compiler announced.

    Raises:
        DeviceMemoryError: the device has less free memory than is planned.
    """

    def __init__(self, device: Device, layouts: Sequence[Layout], weights: Weights) -> None:
        self.device = device
        self._weights, self._layouts = weights, {(layout.rows, layout.images): layout for layout in layouts}
        self._offsets, self.weight_bytes = ({}, 0) if device.shares_host_memory else place_weights(layouts)
        self.arena_bytes = max(layout.arena_bytes for layout in layouts)
        self._memory = device.allocate(self.weight_bytes + self.arena_bytes)
        self._more_scratch: list[Allocation] = []  # all kept: recorded launches know their addresses
        for name in self._offsets:
            device.write(self._weight_ref(name), weights[name])

    def layout(self, rows: int, images: int = 1) -> Layout:
        return self._layouts[rows, images]

    def ref(self, layout: Layout, binding: Binding) -> TensorRef:
        """Where an engine finds a tensor."""
        if isinstance(binding, View):
            offset = layout.buffers[binding.buffer].offset + binding.start
            return TensorRef(self._memory.address + self.weight_bytes + offset, binding.dtype, binding.shape)
        return self._weight_ref(binding.name)

    def scratch(self, layout: Layout, planned: View | None, needed: int) -> Scratch | None:
        """Memory for an engine to work in, for as much as it needs by its own word."""
        if planned is not None and needed <= planned.size:
            return Scratch(self.ref(layout, planned).address, planned.size)
        if needed == 0:
            return None
        if not self._more_scratch or self._more_scratch[-1].size_bytes < needed:
            _log.warning("an engine needs %d bytes of scratch memory, more than was planned", needed)
            self._more_scratch.append(self.device.allocate(needed))
        return Scratch(self._more_scratch[-1].address, self._more_scratch[-1].size_bytes)

    def write(self, layout: Layout, view: View, values: NDArray[Any]) -> None:
        self.device.write(self.ref(layout, view), values)

    def read(self, layout: Layout, view: View) -> NDArray[Any]:
        return self.device.read(self.ref(layout, view))

    def bring_text_encoder(self, layout: Layout) -> None:
        """Copy weights that do not stay to where this layout expects them."""
        for name, view in layout.offloaded_weights.items():
            self.write(layout, view, self._weights[name])

    def _weight_ref(self, name: str) -> TensorRef:
        stored = self._weights.ref(name)
        if self.device.shares_host_memory:
            return stored
        return TensorRef(self._memory.address + self._offsets[name], stored.dtype, stored.shape)


def place_weights(layouts: Sequence[Layout]) -> tuple[dict[str, int], int]:
    """Offset of every weight that stays on the device, and the bytes of all."""
    named: Mapping[str, WeightView] = {n: w for layout in layouts for n, w in layout.weights().items()}
    offsets: dict[str, int] = {}
    end = 0
    for name, weight in named.items():
        offsets[name] = end
        end += aligned(weight.size)
    return offsets, end
