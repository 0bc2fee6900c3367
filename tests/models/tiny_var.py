"""A tiny class-conditional model whose bundle holds the image encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastvar import Pipeline
from fastvar.core.plan import GenerationPlan, SamplingMode
from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.models.codebook.tokenizer import VqTokenizer
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import make_toolchain
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.var import VAR, VarConfig
from tests.models.module_bundle import ModuleBundle

CONFIG = VarConfig(
    depth=2, width=64, heads=4, mlp_width=128, classes=10, codes=64, code_channels=8, scales=(1, 2, 3, 5, 8)
)
IMAGES = VqTokenizerConfig(
    codes=64, code_channels=8, base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1
)
# As few scales as show a cached one, one left out and a pruned one.
PRUNED = PruningPolicy("pruned", {1: ScaleRule(skip=True), 4: ScaleRule(0.25)}, 1, 2, 3)
WITH_ENCODER = BuildOptions(guidance="both", with_encoder=True)
EXECUTED = {0: (1, 1), 2: (3, 3), 3: (5, 5), 4: (8, 8)}


def checkpoint() -> Checkpoint:
    """Random weights; codes as far apart as latents are, so that an image takes many of them."""
    made = random_checkpoint_for(CONFIG, IMAGES, dtype=torch.float32, name="tiny-var")
    images = {name: tensor.float() for name, tensor in made.image_tokenizer_weights.items()}
    images["quantize.embedding.weight"] = 0.5 * torch.randn(64, 8, generator=torch.manual_seed(3))
    images["quant_conv.weight"] = 3 * images["quant_conv.weight"]
    return Checkpoint(**{**made.__dict__, "image_tokenizer_weights": images})


def tokenizer() -> VqTokenizer:
    """The checkpoint's image tokenizer in torch."""
    made = VqTokenizer(IMAGES).eval().requires_grad_(False)
    made.load_state_dict(dict(checkpoint().image_tokenizer_weights))
    return made


def build(out: Path, cache: Path, backend: str = "onnxruntime") -> None:
    """A pruned bundle with the encoder."""
    build_bundle(
        checkpoint(), plan(), out, WITH_ENCODER, toolchain=make_toolchain(backend, precision="fp32"), cache=cache
    )


def modules(folder: Path, policy: PruningPolicy = PRUNED, *, smooth: bool = False, **changes: Any) -> Pipeline:
    """A pipeline of the step modules themselves: nothing is compiled. changes: of the build's options."""
    options = replace(WITH_ENCODER, **changes)
    return ModuleBundle(checkpoint(), plan(policy, smooth), folder, options).pipeline()


def plan(policy: PruningPolicy = PRUNED, smooth: bool = False) -> GenerationPlan:
    return VAR.plan(CONFIG.schedule, policy, CONFIG, SamplingMode(smooth=smooth))
