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

from ..errors import BackendError
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
        """Version of the library that builds and runs the engines.

        Raises:
            BackendError: the library is not installed.
        """

    def accepts(self, library_version: str) -> bool:
        """Whether engines built with that library version run here: by default only with the very same one."""
        return library_version == self.version()

    def check(self, spec: EngineSpec) -> None:
        """Refuse an engine of another backend or library version, before the library sees its bytes.

        Raises:
            BackendError: the engine cannot be loaded here.
        """
        if spec.backend != self.name:
            raise BackendError(f"engine {spec.name!r} is for backend {spec.backend}", expected=f"backend {self.name}")
        if not self.accepts(spec.library_version):
            raise BackendError(
                f"engine {spec.name!r} was built with {self.name} {spec.library_version}, "
                f"version {self.version()} is installed",
                expected="a version that runs engines built by the other",
                fix=f"install {self.name} {spec.library_version}, or rebuild the bundle",
            )

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
