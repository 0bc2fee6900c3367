"""Models whose programs are compiled: one small one of each family, and Infinity-2B."""

from __future__ import annotations

from dataclasses import replace

from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.core.policy import PruningPolicy, ScaleRule
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint, random_checkpoint_for
from fastvar.export.options import BuildOptions
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.hart import HART, HartConfig
from fastvar.families.infinity import INFINITY, ImageTokenizerConfig, TransformerConfig
from fastvar.families.infinity_presets import schedule_for
from fastvar.families.var import VAR, VarConfig

PRUNED = PruningPolicy("pruned", {3: ScaleRule(0.5), 4: ScaleRule(0.25, guidance=False)}, 1, 3, 2)
VQ = VqTokenizerConfig(codes=40, code_channels=8, base_channels=32, channel_multipliers=(1, 1), residual_blocks=1)


def infinity() -> tuple[Checkpoint, GenerationPlan]:
    config = TransformerConfig(
        depth=2, width=64, heads=2, mlp_width=128, text_width=128, text_length=16, code_channels=8, chunks=1
    )
    images = ImageTokenizerConfig(bits=8, base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1)
    schedule = schedule_for((256, 256))
    return random_checkpoint_for(config, images), make_plan(schedule, INFINITY.policy("fastvar", schedule, 2), 2)


def var() -> tuple[Checkpoint, GenerationPlan]:
    config = VarConfig(
        depth=3, width=96, heads=3, mlp_width=192, classes=9, codes=40, code_channels=8, scales=(1, 2, 3, 4, 6)
    )
    return random_checkpoint_for(config, replace(VQ, max_scales=5)), VAR.plan(config.schedule, PRUNED, config)


def hart() -> tuple[Checkpoint, GenerationPlan]:
    config = HartConfig(
        depth=3, width=96, heads=3, mlp_width=256, context_length=6, context_width=32, codes=40, code_channels=8,
        scales=(1, 2, 3, 4, 6), diffusion_width=32, diffusion_depth=1, diffusion_steps=2,
    )  # fmt: skip
    return random_checkpoint_for(config, replace(VQ, max_scales=5)), HART.plan(config.schedule, PRUNED, config)


def infinity_2b() -> tuple[Checkpoint, GenerationPlan]:
    """At 1024x1024, with its text encoder; weights are drawn when they are asked for, and nothing here asks."""
    checkpoint, schedule = random_checkpoint("infinity_2b", text_encoder=True), schedule_for((1024, 1024))
    depth = checkpoint.transformer.depth
    return checkpoint, make_plan(schedule, INFINITY.policy("fastvar", schedule, depth), depth)


def options(capability: str) -> BuildOptions:
    """Programs with guidance: those without differ in the number of rows alone, as those behind its end do."""
    return BuildOptions(backend="aotinductor", target=f"cuda-{capability}", guidance="on")


SMALL = {"infinity": infinity, "var": var, "hart": hart}
