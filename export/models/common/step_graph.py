"""Step graphs: a step module with its arguments and weights, and the key that all it depends on makes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from ....core.precision import Precision
from ....core.provenance import source_digest
from .rows import OpenDims, Shapes
from .weights import Role

MAKERS = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers", "numpy")  # libraries that shape a graph


@dataclass(frozen=True)
class WeightShape:
    """A weight as a module takes it, before it is quantised."""

    shape: tuple[int, ...]
    role: Role


WeightShapes = dict[str, WeightShape]


class StepModule(Protocol):
    """What a module must offer to be traced; `attentions`, where it has any, counts what a compiler must fuse.

    `output_shapes` says beforehand what tracing will find: so a plan needs no graph. A module that is an `OpenModule`
    besides can be traced once for all scales.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]

    def input_shapes(self) -> Shapes: ...

    def output_shapes(self) -> Shapes: ...


@runtime_checkable
class OpenModule(Protocol):
    """A step module whose sizes may be left open: it finds them in the shapes of its tensors, not in its arguments.

    `open_dims` says which dimensions change from scale to scale, of tensors at the border and of buffers, which then
    come from outside like inputs: each as a named size times a number, or as ANY size. `stand_in` gives arguments of
    the same kind in sizes that stand for all others: small, all different, and one where they were one, for compilers
    treat a size of one apart.
    """

    def open_dims(self) -> OpenDims: ...

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]: ...

    def take_sizes(self, memory: dict[str, Tensor]) -> None:
        """Before a forward: sizes that only the memory of the results knows."""


@dataclass(frozen=True)
class StepGraph:
    """A graph to trace: a module class with its arguments, and the weights it is bound to.

    `prefix` goes before the module's weight names in weights.safetensors; it may hold "{layer}". The weights of `layer`
    stand for those of all layers that the graph serves.
    """

    name: str
    factory: type[nn.Module]
    arguments: dict[str, Any]
    prefix: str
    layer: int | str = 0

    def weight_binding(self, module: StepModule) -> dict[str, str]:
        """Names in weights.safetensors, before quantisation."""
        return {name: self.prefix + name for name in module.weights}

    def stand_in(self) -> StepGraph:
        """The graph that stands for this one and for all others of its kind; itself where its sizes are fixed."""
        if not hasattr(self.factory, "stand_in"):
            return self
        factory = cast("type[OpenModule]", self.factory)
        return replace(self, name=self.factory.__name__.lower(), arguments=factory.stand_in(self.arguments))

    def key(self, weights: WeightShapes, precision: Precision) -> str:
        """Digest of all that the graph depends on: arguments, weights, precision, our source and others' versions."""
        content = {
            "kind": f"{self.factory.__module__}.{self.factory.__qualname__}",
            "arguments": {name: _plain(value) for name, value in self.arguments.items()},
            "weights": {name: [weight.shape, weight.role.value] for name, weight in weights.items()},
            "precision": asdict(precision),
            "source": source_digest(self.factory.__module__, __name__),
            "makers": maker_versions(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@cache
def maker_versions() -> dict[str, str]:
    """Versions of the libraries that shape a graph; empty for one that is not installed."""
    return {name: _version(name) for name in MAKERS}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if hasattr(value, "to_dict"):
        return {k: v for k, v in value.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return value
