"""The demo transformer: its configuration, where its weights lie, and how they are read."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.families.infinity import TransformerConfig

CONFIG = TransformerConfig(
    depth=8,
    width=160,
    heads=5,
    mlp_width=512,
    text_width=128,
    text_length=40,
    code_channels=16,
    chunks=2,
)


ROOT = Path(__file__).parents[1]


WEIGHTS = ROOT / "checkpoint" / "transformer.pth"


def load() -> InfinityTransformer:
    """The trained transformer in fp32, without gradients."""
    model = InfinityTransformer(CONFIG).eval().requires_grad_(False)
    model.load_state_dict(torch.load(WEIGHTS))
    return model
