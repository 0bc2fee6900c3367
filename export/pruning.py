"""Cached token pruning (FastVAR, 3.2-3.3): selection, restoration, and one block with or without them.

This is the readable reference that every exported graph is tested against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..schedule import Size
from .infinity import Block, Condition

SUB_LAYERS = ("sa", "ca", "ffn")


@dataclass
class LayerState:
    """What one layer remembers between scales: cached keys and values, and its sub-layer outputs to restore from."""

    keys: Tensor | None = None  # [B, H, S, hd], after rotary
    values: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)  # per sub-layer [B, L_cached, C]
    kept: dict[str, Tensor] = field(default_factory=dict)  # per sub-layer [B, k], of the scale just run


@dataclass(frozen=True)
class ScaleRun:
    """One scale as a block sees it."""

    size: Size
    kept: int
    rotary: Tensor  # [2, L, hd / 2]
    cached_size: Size | None  # grid of the outputs to restore from
    fills_cache: bool
    shared: bool = False  # all sub-layers keep the tokens that the first has chosen


def select(x: Tensor, count: int) -> Tensor:
    """Indices [B, count] of the pivotal tokens: those farthest from the mean token, lowest index first on ties.

    x [B, L, C] is the fp32 residual stream before any norm: in bf16 scores tie and other tokens win.
    """
    score = (x - x.mean(dim=1, keepdim=True)).square().sum(-1)
    return torch.sort(score, dim=1, descending=True, stable=True).indices[:, :count]


def gather(x: Tensor, kept: Tensor) -> Tensor:
    """x [B, L, C], kept [B, k] -> [B, k, C]."""
    return x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def restore(fresh: Tensor, kept: Tensor, cached: Tensor, cached_size: Size, size: Size) -> Tensor:
    """The cached sub-layer output enlarged to the current grid by area, with fresh outputs at the kept positions.

    fresh [B, k, C], kept [B, k], cached [B, h * w of cached_size, C] -> [B, L, C].
    """
    grid = cached.transpose(1, 2).unflatten(2, cached_size)
    enlarged = F.interpolate(grid, size=size, mode="area").flatten(2).transpose(1, 2)
    return enlarged.scatter(1, kept.unsqueeze(-1).expand_as(fresh), fresh)


def run_block(
    block: Block, x: Tensor, condition: Condition, run: ScaleRun, state: LayerState, pruned_layer: bool
) -> Tensor:
    """One block on the residual stream x [B, L, C]; updates the layer's state.

    Each of the three sub-layers selects anew unless the run says that they share; each guidance row by itself. Keep
    ratio 1 is the dense block.
    """
    prunes = pruned_layer and run.kept < x.shape[1]
    text_k, text_v = block.ca.text_kv(condition.text)
    sub_layers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sa": lambda tokens, rotary: _self_attention(block, tokens, rotary, condition, state),
        "ca": lambda tokens, _: block.cross_attention(tokens, text_k, text_v, condition.text_mask),
        "ffn": lambda tokens, _: block.feed_forward(tokens, condition.modulation),
    }
    for name, sub_layer in sub_layers.items():
        if prunes:
            assert run.cached_size is not None
            kept = state.kept["sa"] if run.shared and name != "sa" else select(x, run.kept)
            fresh = sub_layer(gather(x, kept), run.rotary[:, kept])
            out = restore(fresh, kept, state.outputs[name], run.cached_size, run.size)
            state.kept[name] = kept
        else:
            out = sub_layer(x, run.rotary)
        if run.fills_cache and pruned_layer:
            state.outputs[name] = out
        x = x + out
    return x


def _self_attention(block: Block, tokens: Tensor, rotary: Tensor, condition: Condition, state: LayerState) -> Tensor:
    q, k, v = block.project_qkv(tokens, condition.modulation, rotary)
    if state.keys is not None and state.values is not None:
        k, v = torch.cat((state.keys, k), dim=2), torch.cat((state.values, v), dim=2)
    state.keys, state.values = k, v
    return block.self_attention(q, k, v, condition.modulation)
