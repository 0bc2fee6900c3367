"""The demo transformer: its configuration, where its weights lie, and how they are read."""

from __future__ import annotations

from pathlib import Path

import torch

from demo.training.latent_codec import BITS
from demo.training.places import CHECKPOINT
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.families.infinity import TransformerConfig

CONFIG = TransformerConfig(
    depth=10,
    width=192,
    heads=6,
    mlp_width=768,
    text_width=128,
    text_length=40,
    code_channels=BITS,
    chunks=2,
)

WEIGHTS = CHECKPOINT / "transformer.pth"


def load(file: Path = WEIGHTS) -> InfinityTransformer:
    """The trained transformer in fp32, without gradients."""
    model = InfinityTransformer(CONFIG).eval().requires_grad_(False)
    model.load_state_dict(torch.load(file))
    return model
