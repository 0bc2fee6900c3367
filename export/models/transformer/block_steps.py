"""The two halves of a block as step graphs; between them the keys and values of the scale land in the cache.

All families share selection, gathering, attention over the cache and restoration. A family's own halves
(infinity/blocks.py, var/steps.py, hart/blocks.py) say what a block computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.schedule import Size
from ....families.base import TransformerShape
from ..common.rows import (
    OpenDims,
    Shapes,
    Weights,
    area_corners,
    attention,
    enlarged,
    first,
    placed,
    restore,
    rows_of,
    select,
    stand_in,
    tokens_of,
)
from ..common.steps import Step

SMALLER, SIZE, LARGER = (3, 5), (6, 7), (11, 13)  # grids that stand for all others
KEPT, GUIDED, PAST = 23, 13, 61

Tensors = dict[str, Tensor]
SubLayer = Callable[[Tensor], Tensor]  # residual tokens [k * R, C] -> what is added to them [k * R, C]


def _kept(arguments: dict[str, Any], size: Size) -> int:
    """Number of kept tokens in a stand-in of these arguments at another size."""
    if arguments["kept"] == tokens_of(arguments["size"]):
        return tokens_of(size)
    return min(KEPT, tokens_of(size) - 1) if arguments["kept"] > 1 else 1


class BlockStep(Step, ABC):
    """Half of a block, for a scale of `size` whose `kept` tokens it sees; `given` is what the family's blocks read."""

    given: tuple[str, ...] = ()

    def __init__(
        self,
        config: TransformerShape,
        rows: int,
        size: Size,
        kept: int,
        text_rows: int = 0,
        given: tuple[str, ...] | None = None,
    ) -> None:
        """given: where not all blocks of the family read the same."""
        super().__init__()
        self.given = self.given if given is None else given
        self.config, self.rows, self.size, self.kept = config, rows, size, kept
        self.text_rows, self.prunes = text_rows or rows, kept < tokens_of(size)

    def given_shapes(self) -> Shapes:
        """Shapes of what the blocks are given."""
        return {}


class QkvStep(BlockStep):
    """First half of a block: (select, gather,) norm, qkv, positions. Its keys and values go to the cache.

    x [L * R, C] and what the family's blocks are `given` -> q, keys, values [k, R * heads, hd], and when pruned
    kept [k * R] (int64). The weights hold "sa.qkv.weight" [3 C, C] and "sa.qkv.bias" [3 C].
    """

    weights: tuple[str, ...] = ("sa.qkv.weight", "sa.qkv.bias")

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """The arguments are BlockStep's."""
        super().__init__(*arguments, **named)
        self.inputs = ("x", *self.given)
        self.outputs = ("q", "keys", "values", *(("kept",) if self.prunes else ()))

    @abstractmethod
    def normed(self, x: Tensor, given: Tensors, weights: Weights) -> Tensor:
        """The norm before the attention: x [k * R, C] -> [k * R, C], fp32."""

    @abstractmethod
    def positioned(
        self, q: Tensor, k: Tensor, token: Tensor | None, given: Tensors, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys [k, R, heads, hd] with norm, scale and position, in their own element type.

        token [k * R]: which token of the scale each row is; None where all are there.
        """

    def open_dims(self) -> OpenDims:
        kept = "kept" if self.prunes else "tokens"
        own: OpenDims = {"x": {0: ("tokens", self.rows)}}
        return {**own, **{key: {0: (kept, 1)} for key in ("q", "keys", "values")}, "kept": {0: (kept, self.rows)}}

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        size = stand_in(arguments["size"], SIZE)
        return {**arguments, "size": size, "kept": _kept(arguments, size)}

    def take_sizes(self, memory: dict[str, Tensor]) -> None:
        self.kept = memory["q"].shape[0]

    def border(self) -> Shapes:
        c, R = self.config, self.rows
        head_rows = (self.kept, R * c.heads, c.head_dim)
        own: Shapes = {"x": (tokens_of(self.size) * R, c.width), "kept": (self.kept * R,)}
        return {**own, **dict.fromkeys(("q", "keys", "values"), head_rows), **self.given_shapes()}

    def forward(self, x: Tensor, *given: Tensor, weights: Weights) -> tuple[Tensor, ...]:
        c, named = self.config, dict(zip(self.given, given, strict=True))
        token: Tensor | None = None
        kept: tuple[Tensor, ...] = ()
        if self.prunes:
            found = select(x, self.rows, self.kept)  # [k, R]
            chosen, token = rows_of(found, self.rows), found.flatten()
            x, kept = x.index_select(0, chosen), (chosen,)
        h = self.normed(x, named, weights).to(weights["sa.qkv.weight"].dtype)
        qkv = F.linear(h, weights["sa.qkv.weight"], weights["sa.qkv.bias"])
        q, k, v = (t.view(-1, self.rows, c.heads, c.head_dim) for t in qkv.split(c.width, dim=-1))
        q, k = self.positioned(q, k, token, named, weights)
        shape = (-1, self.rows * c.heads, c.head_dim)
        return (q.reshape(shape), k.reshape(shape), v.reshape(shape), *kept)


class AttnMlpStep(BlockStep):
    """Second half of a block: attention over the cache and the other sub-layers, each restored where pruned.

    x [L * R, C], q [k, R * heads, hd], keys, values [S, R * heads, hd] and what the family's blocks are `given`; when
    pruned kept [k * R] and cached_<sub-layer> [Lc * R, C] -> x_out [L * R, C]; when it fills the cache
    cache_<sub-layer> [L * R, C]; when pruned kept_<sub-layer> but for the first, unless all share its selection.

    Where guidance has been switched off, R is one, and the given tensors have two rows. So has the older part of the
    cache, which is read besides: guided_keys, guided_values [S', 2 * heads, hd]. The conditional row is the first.
    """

    corners: Tensor

    sub_layers: ClassVar[tuple[str, ...]]
    attentions = 1  # that a compiler of GPU engines must fuse
    attention = staticmethod(attention)  # tracing/torch_export.py puts another form in its place

    def __init__(
        self,
        config: TransformerShape,
        rows: int,
        size: Size,
        kept: int,
        past: int,
        cached_size: Size | None,
        fills: bool,
        text_rows: int = 0,
        cached_rows: int = 0,
        guided_past: int = 0,
        shared: bool = False,
        given: tuple[str, ...] | None = None,
        restored: tuple[str, ...] = (),
    ) -> None:
        """restored: sub-layers that are not run, where tokens are pruned: their cached output stands for all of it."""
        super().__init__(config, rows, size, kept, text_rows, given)
        self.restored = restored
        self.cached_rows = cached_rows or rows
        self.guided_past = guided_past if self.text_rows > rows else 0
        self.past, self.cached_size, self.fills, self.shared = past, cached_size, fills, shared
        self.inputs = ("x", "q", "keys", "values", *self.given)
        self.outputs = ("x_out",)
        if fills:
            self.outputs += tuple(f"cache_{name}" for name in self.sub_layers)
        if self.prunes:
            assert cached_size is not None
            self.inputs += ("kept", *self._cached)
            choosing = [name for name in self.sub_layers[1:] if name not in restored]
            self.outputs += () if shared else tuple(f"kept_{name}" for name in choosing)
            corners = area_corners(cached_size, size, rows, self.cached_rows)
            self.register_buffer("corners", corners, persistent=False)
        if self.guided_past:
            self.inputs += ("guided_keys", "guided_values")

    @abstractmethod
    def branches(self, attn_mlp: Callable[[], Tensor], given: Tensors, weights: Weights) -> Sequence[SubLayer]:
        """The sub-layers in order, each with its norm and gate, giving fp32.

        The other half has seen the tokens of the first one: it calls `attn_mlp` for the attention over the cache
        [k * R, C], before the output projection.
        """

    @property
    def _cached(self) -> tuple[str, ...]:
        return tuple(f"cached_{name}" for name in self.sub_layers)

    def open_dims(self) -> OpenDims:
        kept, R = "kept" if self.prunes else "tokens", self.rows
        if self.shared:  # torch 2.13 cannot compile this form with sizes left open
            return {}
        filled = tuple(f"cache_{name}" for name in self.sub_layers)
        chosen = tuple(f"kept_{name}" for name in self.sub_layers[1:])
        return {
            "corners": {1: ("tokens", R)},
            "q": {0: (kept, 1)},
            **{key: {0: ("tokens", R)} for key in ("x", "x_out", *filled)},
            **{key: {0: (kept, R)} for key in ("kept", *chosen)},
            **{key: {0: ("keys", 1)} for key in ("keys", "values")},
            **{key: {0: ("guided", 1)} for key in ("guided_keys", "guided_values")},
            **{key: {0: ("cached", self.cached_rows)} for key in self._cached},
        }

    @classmethod
    def stand_in(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if arguments.get("shared"):
            return arguments
        size, cached = stand_in(arguments["size"], SIZE), arguments["cached_size"]
        kept, guided = _kept(arguments, size), arguments.get("guided_past", 0)
        guided = GUIDED if guided > 1 else guided
        alone = kept == 1 and arguments["past"] == arguments.get("guided_past", 0)  # one key, the scale's own
        sizes = {"size": size, "kept": kept, "past": guided + (0 if alone else PAST), "guided_past": guided}
        return {**arguments, **sizes, "cached_size": cached and stand_in(cached, SMALLER)}

    def border(self) -> Shapes:
        c, R = self.config, self.rows
        whole, kept = (tokens_of(self.size) * R, c.width), (self.kept * R,)
        kv = (self.past - self.guided_past + self.kept, R * c.heads, c.head_dim)
        older = (self.guided_past, self.text_rows * c.heads, c.head_dim)
        cached = (tokens_of(self.cached_size or self.size) * self.cached_rows, c.width)
        return {
            **dict.fromkeys(("x", "x_out", *(f"cache_{name}" for name in self.sub_layers)), whole),
            "q": (self.kept, R * c.heads, c.head_dim),
            **dict.fromkeys(("keys", "values"), kv),
            **dict.fromkeys(("kept", *(f"kept_{name}" for name in self.sub_layers)), kept),
            **dict.fromkeys(self._cached, cached),
            **dict.fromkeys(("guided_keys", "guided_values"), older),
            **self.given_shapes(),
        }

    def forward(
        self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, *further: Tensor, weights: Weights
    ) -> tuple[Tensor, ...]:
        R, C = self.rows, self.config.width
        named = dict(zip(self.inputs[4:], further, strict=True))
        if self.guided_past:
            own = R * self.config.heads
            keys = torch.cat((first(named["guided_keys"], own, 1), keys))
            values = torch.cat((first(named["guided_values"], own, 1), values))
        sub_layers = self.branches(lambda: self.attention(q, keys, values, None, C), named, weights)
        if self.prunes and self.shared:
            return (self._shared_forward(x, sub_layers, named),)
        filled, chosen = [], []
        for i, (name, sub_layer) in enumerate(zip(self.sub_layers, sub_layers, strict=True)):
            if name in self.restored:
                out = enlarged(named[f"cached_{name}"], self.corners)
            elif self.prunes:
                # The self-attention's own selection was made in the first half, where its queries come from.
                kept = named["kept"] if i == 0 else rows_of(select(x, R, q.shape[0]), R)
                out = restore(sub_layer(x.index_select(0, kept)), kept, named[f"cached_{name}"], self.corners)
                chosen.append(kept)
            else:
                out = sub_layer(x)
            filled.append(out.to(q.dtype))  # the token cache is kept in the precision of keys and values
            x = x + out
        return (x, *(filled if self.fills else ()), *chosen[1:])

    def _shared_forward(self, x: Tensor, sub_layers: Sequence[SubLayer], named: Tensors) -> Tensor:
        """All sub-layers on the tokens that the first one keeps."""
        tokens = x.index_select(0, named["kept"])
        for name, added in zip(self.sub_layers, sub_layers, strict=True):
            if name in self.restored:
                cached = named[f"cached_{name}"]
                tokens = tokens + enlarged(cached, self.corners.index_select(1, named["kept"]))
            else:
                tokens = tokens + added(tokens)
        rest = x + sum(enlarged(named[name], self.corners) for name in self._cached)
        return placed(tokens, named["kept"], rest)
