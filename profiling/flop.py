"""Floating-point operations of the transformer, counted from the plan: matrix products and attention.

A multiplication with its addition counts as two. Norms, gates, resizing and sampling are left out: under one percent.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TransformerConfig
from ..engines.manifest import Manifest
from ..plan import GenerationPlan


@dataclass(frozen=True)
class Flop:
    """Operations of one image, by what they are spent on."""

    matrices: int  # of all layers, and of head and embedding
    self_attention: int
    text: int  # cross-attention, and its keys and values

    @property
    def total(self) -> int:
        return self.matrices + self.self_attention + self.text


def transformer_flop(config: TransformerConfig, plan: GenerationPlan, rows: int, text_length: int) -> Flop:
    """All scales of one image with `rows` guidance rows; the text is attended at its static length."""
    C = config.width
    layer = 2 * C * (6 * C + 2 * config.mlp_width)  # q, k, v, two projections, the text's query, feed-forward
    ends = 2 * 3 * C * config.code_channels  # two logits a bit out, one code in
    matrices = attention = text = 0
    for step in plan.steps:
        matrices += ends * step.tokens
        for depth in range(plan.depth):
            pruned = plan.policy.prunes(depth)
            tokens = step.kept if pruned else step.tokens
            past = step.past_pruned if pruned else step.past_dense
            matrices += layer * tokens
            attention += 4 * C * tokens * (past + tokens)
            text += 4 * C * tokens * text_length
    text += plan.depth * 2 * C * 2 * C * text_length
    return Flop(rows * matrices, rows * attention, rows * text)


def manifest_flop(manifest: Manifest, rows: int) -> int:
    """The same from a bundle's manifest, added up."""
    return transformer_flop(manifest.transformer, manifest.plan, rows, manifest.text_length).total


def cache_bytes(config: TransformerConfig, plan: GenerationPlan, rows: int, item_bytes: int) -> int:
    """Keys and values of all layers at the end of an image."""
    return sum(2 * plan.capacity(layer) * rows * config.width * item_bytes for layer in range(plan.depth))
