"""The tensors that engines are bound to: role and source of each. A tensor is made when it is fetched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ....core.precision import Precision


class Role(Enum):
    """The use of a weight, which decides the element type it is stored in."""

    FP32 = "exact"  # norms, gates, embeddings: used in fp32
    COMPUTE = "operand"  # of a matrix product or convolution in the compute precision
    QUANTIZABLE = "matrix"  # the same, and one of the large ones that may be stored quantised: [outputs, inputs]

    def dtype(self, precision: Precision) -> str:
        """Element type in which a graph computes with it."""
        return "float32" if self is Role.FP32 else precision.compute

    def stored_dtype(self, precision: Precision) -> str:
        """Element type in weights.safetensors."""
        return precision.weights if self.is_quantised(precision) else self.dtype(precision)

    def is_quantised(self, precision: Precision) -> bool:
        return self is Role.QUANTIZABLE and precision.weights != ""


@dataclass(frozen=True)
class WeightSource:
    """One tensor of weights.safetensors: its shape, its role, and how to make it."""

    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]
    role: Role = Role.FP32


State = Mapping[str, Tensor]  # official names
Sources = dict[str, WeightSource]  # names of the weight file


def plain_weights(
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Tensor],
    role: Callable[[str], Role],
) -> dict[str, WeightSource]:
    """Tensors as they are, under a prefix."""
    return {f"{prefix}.{n}": WeightSource(shape, getter(state, n), role(n)) for n, shape in shapes.items()}


def getter(state: Mapping[str, Tensor], name: str) -> Callable[[], Tensor]:
    """A function that gives a tensor as it is."""
    return lambda: state[name]


def affine(*layers: str) -> tuple[str, ...]:
    """The names of the layers' weights and biases."""
    return tuple(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))
