"""A layout on memory: launches prepared on the addresses that it gives them, tensors read and written by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.tensors import Launch
from ...engines.base import Engine
from ...errors import InternalError
from .arena import Memory
from .layout import EngineCall, Layout, View


class BoundLayout:
    """Prepares what a layout plans, each engine when it is first asked for."""

    def __init__(self, layout: Layout, engines: Mapping[str, Engine], memory: Memory) -> None:
        self.layout, self.memory, self.device = layout, memory, memory.device
        self._engines = engines

    def prepare(self, call: EngineCall | None) -> Launch:
        """The launch of a call; one that fails, where nothing is planned."""
        if call is None:
            return _nothing
        engine = self._engines[call.engine]
        tensors = {name: self.memory.ref(self.layout, binding) for name, binding in call.tensors.items()}
        launch = engine.prepare(tensors, self.memory.scratch(self.layout, call.scratch, engine.scratch_bytes))
        return self._with_copies(launch, call) if call.copies else launch

    def _with_copies(self, launch: Launch, call: EngineCall) -> Launch:
        copies = [tuple(self.memory.ref(self.layout, view) for view in (c.target, c.source)) for c in call.copies]
        device = self.device  # not `self`: memory goes with the workspace, not with the next garbage collection

        def run() -> None:
            launch()
            for target, source in copies:
                device.copy(target, source)

        return run

    def view(self, call: EngineCall, name: str) -> View:
        """Where an engine call finds a tensor that is no weight."""
        view = call.tensors[name]
        if not isinstance(view, View):
            raise InternalError(f"{call.engine}: {name} is a weight")
        return view

    def read(self, view: View) -> NDArray[Any]:
        """The tensor at a place of the layout: on the CPU a live view, from a GPU a copy; bfloat16 as uint16."""
        return self.memory.read(self.layout, view)

    def write(self, view: View, values: Any) -> None:
        self.memory.write(self.layout, view, np.asarray(values))

    def copy(self, target: View, source: View) -> None:
        """Copy a tensor to another place, in order with the launches."""
        self.device.copy(self.memory.ref(self.layout, target), self.memory.ref(self.layout, source))


def _nothing() -> None:
    raise InternalError("this launch was not planned")
