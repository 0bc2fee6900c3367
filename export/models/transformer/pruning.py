"""Cached token pruning (FastVAR, 3.2-3.3): selection, restoration, and one block with or without them.

This is the readable reference that every exported graph is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.plan import GenerationPlan, StepPlan
from ....core.schedule import Size
from ..common.rows import pivotal

# Residual tokens [B, k, C], and which tokens of the scale they are [B, k] (None: all) -> what is added to them.
SubLayer = Callable[[Tensor, Tensor | None], Tensor]


CROSS_ATTENTION = "ca"  # the sub-layer that reads the text, in families that have one


@dataclass
class LayerState:
    """What one layer remembers between scales: cached keys and values, and its sub-layer outputs to restore from."""

    keys: Tensor | None = None  # [B, H, S, hd], after rotary
    values: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)  # per sub-layer [B, L_cached, C]
    kept: dict[str, Tensor] = field(default_factory=dict)  # per sub-layer [B, k], of the scale just run

    def appended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, S, hd] with a scale's own behind those of earlier scales."""
        if self.keys is not None and self.values is not None:
            k, v = torch.cat((self.keys, k), dim=2), torch.cat((self.values, v), dim=2)
        self.keys, self.values = k, v
        return k, v

    def drop_rows(self, count: int) -> None:
        """Keep the first `count` guidance rows."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[:count], self.values[:count]
        self.outputs = {name: out[:count] for name, out in self.outputs.items()}


class PrunedBlock(Protocol):
    """A block of a transformer, as pruning sees it."""

    def sub_layers(self, conditioning: Any, positions: Any, state: LayerState) -> dict[str, SubLayer]:
        """The sub-layers by name, in order; the self-attention comes first, and appends to the state."""


@dataclass(frozen=True)
class ScaleRun:
    """One scale as a block sees it."""

    size: Size
    kept: int
    positions: Tensor | None  # of all its tokens, as the family's blocks take them: rotary tables
    cached_size: Size | None  # grid of the outputs to restore from
    writes_restore_cache: bool
    shared: bool = False  # all sub-layers keep the tokens that the first has chosen
    text: bool = True  # the cross-attention is run; else all its output is restored


def select(x: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the pivotal tokens of x [B, L, C] (see rows.pivotal)."""
    return pivotal(x.transpose(0, 1), count).t()


def gather(x: Tensor, kept: Tensor) -> Tensor:
    """x [B, L, C], kept [B, k] -> [B, k, C]."""
    return x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def restore(fresh: Tensor, kept: Tensor, cached: Tensor, cached_size: Size, size: Size) -> Tensor:
    """The cached sub-layer output enlarged to the current grid by area, with fresh outputs at the kept positions.

    fresh [B, k, C], kept [B, k], cached [B, h * w of cached_size, C] -> [B, L, C].
    """
    enlarged = enlarge_cached(cached, cached_size, size)
    return enlarged.scatter(1, kept.unsqueeze(-1).expand_as(fresh), fresh)


def enlarge_cached(cached: Tensor, cached_size: Size, size: Size) -> Tensor:
    """A cached sub-layer output [B, h * w of cached_size, C], enlarged by area to [B, L, C]."""
    grid = cached.transpose(1, 2).unflatten(2, cached_size)
    return F.interpolate(grid, size=size, mode="area").flatten(2).transpose(1, 2)


def run_block(
    block: PrunedBlock, x: Tensor, conditioning: Any, run: ScaleRun, state: LayerState, pruned_layer: bool
) -> Tensor:
    """One block on the residual stream x [B, L, C]; updates the layer's state.

    Each sub-layer selects anew unless the run says that they share; each guidance row by itself. Keep ratio 1 is the
    dense block.
    """
    prunes = pruned_layer and run.kept < x.shape[1]
    for name, sub_layer in block.sub_layers(conditioning, run.positions, state).items():
        if prunes and name == CROSS_ATTENTION and not run.text:
            assert run.cached_size is not None
            out = enlarge_cached(state.outputs[name], run.cached_size, run.size)
            state.kept.pop(name, None)
        elif prunes:
            assert run.cached_size is not None
            kept = state.kept["sa"] if run.shared and name != "sa" else select(x, run.kept)
            out = restore(sub_layer(gather(x, kept), kept), kept, state.outputs[name], run.cached_size, run.size)
            state.kept[name] = kept
        else:
            out = sub_layer(x, None)
        if run.writes_restore_cache and pruned_layer:
            state.outputs[name] = out
        x = x + out
    return x


def run_blocks(
    blocks: Sequence[PrunedBlock],
    x: Tensor,
    conditioning: Any,
    plan: GenerationPlan,
    step: StepPlan,
    states: list[LayerState],
    positions: Tensor | None,
    whole: bool = True,
) -> list[Tensor]:
    """All blocks of one scale: the outputs [B, L, C] of every layer. A part of a scale (not `whole`) is not pruned."""
    shared = plan.policy.shared_selection
    run = ScaleRun(step.size, step.kept, positions, plan.cached_size, step.writes_restore_cache, shared, step.text)
    outputs = []
    for i, (block, state) in enumerate(zip(blocks, states, strict=True)):
        x = run_block(block, x, conditioning, run, state, whole and plan.policy.prunes(i))
        outputs.append(x)
    return outputs
