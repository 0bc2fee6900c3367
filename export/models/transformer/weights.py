"""From official tensors of transformers to the tensors that step graphs are bound to: the part that families share.

Nothing is read before it is asked for. Shapes are those of the official tensors; all layers have the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ....families.base import TransformerShape, TransformerT
from ..common.rows import Shapes
from ..common.tensor_shapes import module_shapes
from ..common.weights import Role, Sources, State, WeightSource, getter
from .layers import MAX_LOG_SCALE

FIRST_LAYER = "blocks.0."


@dataclass(frozen=True)
class Official:
    """Official tensors: shapes by name, and the state that holds them, there under a prefix."""

    shapes: Shapes
    state: State
    prefix: str = ""

    @classmethod
    def of(cls, make: Callable[[TransformerT], nn.Module], config: TransformerT, state: State) -> Official:
        """The tensors of a transformer, which `make` builds from a configuration whose layers are not chunked."""
        return cls(module_shapes(make, replace(config, depth=1)), state)

    def layer(self, prefix: str) -> Official:
        """The tensors of the layer whose names begin with a prefix."""
        start = len(FIRST_LAYER)
        own = {name[start:]: shape for name, shape in self.shapes.items() if name.startswith(FIRST_LAYER)}
        return Official(own, self.state, prefix)

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def taken(self, names: Iterable[str], role: Role = Role.FP32) -> Sources:
        """Tensors as they are, under their own names."""
        return {n: WeightSource(self.shapes[n], getter(self.state, self.prefix + n), role) for n in names}

    def renamed(self, name: str, role: Role = Role.FP32) -> WeightSource:
        """One tensor as it is, for another name."""
        return self.taken([name], role)[name]


def all_layers(depth: int, layer: Callable[[int], Sources]) -> Sources:
    """The tensors of every layer, as "blocks.<layer>.<name>"."""
    return {f"blocks.{i}.{name}": source for i in range(depth) for name, source in layer(i).items()}


def attention_weights(
    config: TransformerShape,
    official: Official,
    key: str,
    qkv: str,
    unit_queries: bool = True,
    order: Tensor | None = None,
) -> Sources:
    """One layer's "sa.*" from the self-attention under `key`, where `qkv` is the key of the fused matrix.

    order: row indices of queries and keys [C], where the graph has another order than the official one.
    """

    def ordered(tensor: Tensor) -> Tensor:
        return tensor if order is None else tensor[order]

    def matrix() -> Tensor:
        whole = official[f"{key}.{qkv}.weight"]
        if order is None:
            return whole
        q, k, v = whole.chunk(3)
        return torch.cat((ordered(q), ordered(k), v))

    def bias() -> Tensor:
        q, v = official[f"{key}.q_bias"], official[f"{key}.v_bias"]
        return torch.cat((ordered(q), torch.zeros_like(q), v))

    def q_scale() -> Tensor:
        return official[f"{key}.scale_mul_1H11"].float().flatten().clamp(max=MAX_LOG_SCALE).exp()

    width = config.width
    sources = {
        "sa.qkv.weight": WeightSource((3 * width, width), matrix, Role.QUANTIZABLE),
        "sa.qkv.bias": WeightSource((3 * width,), bias, Role.COMPUTE),
        "sa.proj.weight": official.renamed(f"{key}.proj.weight", Role.QUANTIZABLE),
        "sa.proj.bias": official.renamed(f"{key}.proj.bias", Role.COMPUTE),
    }
    return sources | ({"sa.q_scale": WeightSource((config.heads,), q_scale)} if unit_queries else {})
