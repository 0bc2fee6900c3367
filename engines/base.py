"""What a backend is. Invariants:

* an engine holds no transformer weights: they are inputs, bound by address, layer after layer;
* shapes are static, so a call is prepared once (`prepare`) and then only launched;
* a prepared launch reads and writes the memory it was given and allocates none that outlives it;
* launches of one stream run in the order they were made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .manifest import EngineSpec

Launch = Callable[[], None]


@dataclass(frozen=True)
class TensorRef:
    """Memory that an engine reads or writes: contiguous, alive for as long as the launch is."""

    address: int
    dtype: str
    shape: tuple[int, ...]


class Engine(ABC):
    """A loaded engine; safe to launch from several threads on different memory."""

    @abstractmethod
    def prepare(self, tensors: Mapping[str, TensorRef]) -> Launch:
        """Bind every input and output by name.

        Raises:
            InternalError: a name is missing, or shape or dtype differ from the engine's.
        """


class Backend(ABC):
    """Turns step graphs (ONNX) into engines, and loads them."""

    name: str

    @abstractmethod
    def version(self) -> str:
        """Version of the library that builds and runs the engines."""

    @abstractmethod
    def build(self, graph: bytes, target: str) -> bytes:
        """ONNX bytes -> engine bytes for a target; deterministic.

        Raises:
            BuildError: the library rejects the graph; names the node.
        """

    @abstractmethod
    def load(self, engine: bytes, spec: EngineSpec) -> Engine:
        """Load engine bytes whose digest was checked before.

        Raises:
            BackendError: made by another library version, or the device is not there.
        """
