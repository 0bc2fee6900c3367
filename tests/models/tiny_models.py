"""A tiny model, schedule and policy that exercise every kind of step in milliseconds."""

from dataclasses import replace

import torch
from torch import Tensor

from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.core.schedule import ScaleSchedule
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.families.infinity import TransformerConfig

CONFIG = TransformerConfig(
    depth=3, width=48, heads=3, mlp_width=64, text_width=128, text_length=8, code_channels=6, chunks=1, max_scales=8
)
PATCHIFIED = replace(CONFIG, code_channels=12, spatial_patchify=True)
# Not square; scale 2 is cached, 3 is pruned, 4 is skipped, 5 is dense again behind a pruned past, 6 is pruned.
SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (3, 4), (4, 5), (5, 6), (5, 7), (6, 8)), (12, 16))
POLICY = PruningPolicy("test", {3: ScaleRule(0.6), 4: ScaleRule(skip=True), 6: ScaleRule(0.25)}, 1, 3, 2)


def plan(policy: PruningPolicy = POLICY, depth: int = CONFIG.depth) -> GenerationPlan:
    return make_plan(SCHEDULE, policy, depth)


def first_and_last() -> GenerationPlan:
    """The fewest engines that make an image."""
    return plan(PruningPolicy("ends", dict.fromkeys(range(1, len(SCHEDULE) - 1), ScaleRule(skip=True))))


def without_guidance(policy: PruningPolicy, start: int) -> PruningPolicy:
    """The policy with guidance switched off from a scale on."""
    off = {i: replace(policy.rule(i), guidance=False) for i in range(start, len(SCHEDULE))}
    return replace(policy, rules={**policy.rules, **off})


def without_text(policy: PruningPolicy, start: int) -> PruningPolicy:
    """The policy with the text out of the pruned layers of all pruned scales from one on."""
    off = {i: replace(rule, text=False) for i, rule in policy.rules.items() if i >= start and rule.keep < 1}
    return replace(policy, rules={**policy.rules, **off})


def dense_plan() -> GenerationPlan:
    return plan(DENSE)


def model(config: TransformerConfig = CONFIG, seed: int = 0) -> InfinityTransformer:
    """Random weights large enough that every term of the forward shows in the output."""
    torch.manual_seed(seed)
    made = InfinityTransformer(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter.normal_(std=0.3 if parameter.dim() < 2 or "ada_gss" in name else parameter.shape[-1] ** -0.5)
        if name.endswith("norm.weight"):
            parameter.add_(1)
    made.cfg_uncond.normal_()
    return made


def text(config: TransformerConfig = CONFIG, lengths: tuple[int, ...] = (5, 8)) -> tuple[Tensor, Tensor]:
    """Features [R, T, Ct] and mask [R, T]; row i has lengths[i] tokens."""
    features = torch.randn(len(lengths), config.text_length, config.text_width, generator=torch.manual_seed(1))
    mask = torch.arange(config.text_length) < torch.tensor(lengths)[:, None]
    return features * mask[..., None], mask


def noise(index: int, shape: tuple[int, int]) -> Tensor:
    return torch.rand(shape, generator=torch.manual_seed(100 + index))
