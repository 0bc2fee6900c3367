"""A tiny HART with its image tokenizer, a prompt, and randomness that reference and engines can share."""

from __future__ import annotations

import torch

from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.export.models.codebook.tokenizer import VqTokenizer
from fastvar.export.models.hart.model import HartTransformer
from fastvar.export.models.hart.reference import Draws, Prompt
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.hart import HartConfig

CONFIG = HartConfig(
    depth=2,
    width=32,
    heads=2,
    mlp_width=64,
    context_length=5,
    context_width=12,
    codes=40,
    code_channels=4,
    scales=(1, 2, 3, 4, 6),
    diffusion_width=16,
    diffusion_depth=1,
    diffusion_steps=3,
)
TOKENIZER = VqTokenizerConfig(codes=40, code_channels=4, base_channels=32, channel_multipliers=(1,), residual_blocks=1)
PRUNED = PruningPolicy("test", {3: ScaleRule(0.5), 4: ScaleRule(0.25)}, 0, 2, 2)


def model(config: HartConfig = CONFIG) -> HartTransformer:
    torch.manual_seed(0)
    made = HartTransformer(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter.normal_(std=0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5)
        if "ln_wo_grad" in name or "norm" in name:
            parameter.add_(1)
    return made


def tokenizer() -> VqTokenizer:
    torch.manual_seed(1)
    return VqTokenizer(TOKENIZER).eval().requires_grad_(False)


def prompt(lengths: tuple[int, ...] = (3, 5)) -> Prompt:
    features = torch.randn(len(lengths), 5, 12, generator=torch.manual_seed(2))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return Prompt(features, mask, mask.long().cumsum(1) - 1)


def normal(index: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.manual_seed(index))


def uniform(index: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.manual_seed(50 + index))


DRAWS = Draws(codes=uniform, gumbel=normal, diffusion=normal)
