"""The class-conditional VAR transformers, as nouns: sizes, scale schedules, and the pruning preset.

Knows no weights, no torch, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.policy import PruningPolicy, ScaleRule, dense_policy
from ..core.schedule import ScaleSchedule
from ..errors import CheckpointError
from .base import Family, SamplingDefaults, SquareScales, from_fields, own_schedule
from .codebook import VAR_TOKENIZER, VqTokenizerConfig
from .settings import PublishedNames, mlp_ratio, settings_from_json

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
UNPRUNED_LAYERS = 2  # the first ones, in the pruning preset


@dataclass(frozen=True)
class VarConfig(SquareScales):
    """Sizes of a VAR transformer (upstream: VAR, models/var.py).

    Its positions are learned, one per token of all scales: a model draws images of one size alone.
    """

    depth: int
    width: int
    heads: int
    mlp_width: int
    classes: int  # without the unconditional one, which the class embedding holds behind them
    codes: int  # vocabulary size: rows of the image tokenizer's codebook
    code_channels: int
    scales: tuple[int, ...] = SCALES_256  # side of every token grid
    shared_modulation: bool = False  # one adaptive layer norm for all blocks, to which each adds an offset
    unit_queries: bool = True  # queries and keys are l2-normalised, with a learned scale per head
    text_length = text_width = 0  # no prompts are read

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.heads, self.mlp_width, self.classes, self.codes, self.code_channels) < 1:
            raise CheckpointError(f"invalid model configuration: a size of {self} is not positive")
        if self.width % self.heads:
            raise CheckpointError(
                f"invalid model configuration: width {self.width} does not divide into {self.heads} attention heads"
            )
        if self.scales[:1] != (1,) or tuple(sorted(self.scales)) != self.scales:
            raise CheckpointError(
                f"invalid model configuration: scales {list(self.scales)}",
                expected="sides of token grids from 1 on, none smaller than the one before it",
            )

    @property
    def tokens(self) -> int:
        """Tokens of all scales together."""
        return self.first_token(self.max_scales)

    def first_token(self, scale: int) -> int:
        """Where a scale begins in the row of all tokens."""
        return sum(side * side for side in self.scales[:scale])


def _published(depth: int, scales: tuple[int, ...] = SCALES_256, shared_modulation: bool = False) -> VarConfig:
    """The published rule: a layer more is a head of 64 channels more."""
    return VarConfig(
        depth=depth,
        width=64 * depth,
        heads=depth,
        mlp_width=4 * 64 * depth,
        classes=1000,
        codes=4096,
        code_channels=32,
        scales=scales,
        shared_modulation=shared_modulation,
    )


TRANSFORMERS: dict[str, VarConfig] = {
    "var_d16": _published(16),
    "var_d20": _published(20),
    "var_d24": _published(24),
    "var_d30": _published(30),
    "var_d36s": _published(36, SCALES_512, shared_modulation=True),
}


def fastvar_policy(schedule: ScaleSchedule, depth: int) -> PruningPolicy:
    """The `fastvar` preset. None is published for VAR: this one is ours.

    Half of the second last scale's tokens are forwarded and a quarter of the last one's, in all layers but the first
    two, restored from the scale before them.

    Chosen from `python -m demo.measuring.var_tradeoff` (benchmarks/results/var-tradeoff.json): a model of 6 layers
    trained on drawn shapes at 256x256, 113 images at equal seeds, onnxruntime fp32. Against dense: PSNR 33.8 dB, SSIM
    0.990, colour right 0.929 (dense 0.920), colour and kind 0.451 (dense 0.434: 2 images lost, 4 won), all scales 1.23
    times as fast. With the first two layers pruned too: 30.7 dB, colour 0.894, 1.35 times; a third scale besides: 28.5
    dB, 0.832. By arithmetic alone it leaves 0.61 of the scales' FLOP to var_d30 and 0.53 to var_d36s; every layer
    pruned would leave 0.59 and 0.50. Differences of less than 0.03 are within chance, and nothing was measured on
    published weights, where two layers are a smaller part of the depth.
    """
    last = len(schedule) - 1
    if last < 3:
        return PruningPolicy("fastvar")
    rules = {last - 1: ScaleRule(0.5), last: ScaleRule(0.25)}
    return PruningPolicy("fastvar", rules, min(UNPRUNED_LAYERS, depth), depth, last - 2)


_PUBLISHED_NAMES = PublishedNames(
    names={
        "embed_dim": "width",
        "num_heads": "heads",
        "num_classes": "classes",
        "patch_nums": "scales",
        "shared_aln": "shared_modulation",
        "attn_l2_norm": "unit_queries",
    },
    converted={"mlp_ratio": mlp_ratio(lambda width, ratio: round(width * ratio))},
    only={"norm_eps": 1e-6, "disable_aln": False, "attn_type": "gpt2", "mlp_type": "gpt2", "use_cross_attn": False},
)


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    return settings_from_json(VarConfig, data, _PUBLISHED_NAMES)


def _from_json(data: dict[str, Any]) -> VarConfig:
    return from_fields(VarConfig, _settings(data))


VAR = Family(
    name="var",
    transformer=VarConfig,
    image_tokenizer=VqTokenizerConfig,
    transformers=TRANSFORMERS,
    image_tokenizer_for=lambda _: VAR_TOKENIZER,
    schedules=own_schedule,
    presets={"dense": dense_policy, "fastvar": fastvar_policy},
    transformer_from_json=_from_json,
    settings_from_json=_settings,
    sampling=SamplingDefaults(guidance_scale=4.0, tau=None, top_p=0.95, top_k=900),  # upstream's demo
    guidance_off=0.0,
    draws="class label",
    drawings=frozenset({"smooth"}),
)
