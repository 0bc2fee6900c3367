"""HART: sizes of its transformer, its schedule and pruning preset, and the sampling rules that depend on the scale.

Nouns and numbers only: no weights, no torch, no files (upstream: mit-han-lab/hart; FastVAR, folder HART).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..core.policy import PruningPolicy, ScaleRule, dense_policy
from ..core.schedule import ScaleSchedule
from ..errors import CheckpointError, PlanError
from .base import Family, SamplingDefaults, SquareScales, from_fields, own_schedule
from .codebook import VqTokenizerConfig
from .settings import PublishedNames, mlp_ratio, settings_from_json

PUBLISHED_SCALES = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
POOLINGS = ("max", "avg")
MOST_TOKENS, MOST_CELLS = 1 << 15, 1 << 10  # of a prompt, and of a side of a token grid: sizes that no tensor bounds
RESIDUAL_GAIN = 0.6  # what the diffusion head draws is multiplied by this before it is added


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CheckpointError(f"invalid HART configuration: {problem}")


@dataclass(frozen=True)
class HartConfig(SquareScales):
    """Sizes of a HART transformer with its diffusion head (upstream: hart/modules/models/transformer).

    The context tokens take the place of the 1x1 scale: there is no token of that scale besides.
    """

    depth: int
    width: int
    heads: int
    mlp_width: int
    context_length: int  # prompt tokens, padding included
    context_width: int  # channels of a text feature
    codes: int
    code_channels: int
    scales: tuple[int, ...] = PUBLISHED_SCALES  # side of every token grid
    unit_queries: bool = True  # queries and keys are l2-normalised, with a learned scale per head
    modulated: bool = False  # blocks have an adaptive norm and gates, from the pooled context
    pooling: str = "max"  # of the context tokens, for modulated blocks
    timestep_levels: bool = True  # the level embedding is computed from the scale's number, not looked up
    context_norm: bool = True
    diffusion_width: int = 1024
    diffusion_depth: int = 6
    diffusion_steps: int = 8
    classes = 0  # none are read

    def __post_init__(self) -> None:
        _require(self.depth > 0 and self.width > 0 and self.heads > 0, "depth, width and heads must be positive")
        _require(self.width % self.heads == 0, f"width {self.width} does not divide into {self.heads} attention heads")
        _require(self.head_dim % 4 == 0, f"head size {self.head_dim} must be a multiple of 4 for 2-D rotary")
        _require(0 < self.context_length <= MOST_TOKENS, f"{self.context_length} tokens of a prompt")
        _require(
            len(self.scales) > 1 and self.scales[0] == 1 and all(a < b for a, b in pairwise(self.scales)),
            f"scales {list(self.scales)} must grow from 1",
        )
        _require(self.scales[-1] <= MOST_CELLS, f"a last scale of {self.scales[-1]} tokens a side")
        _require(self.pooling in POOLINGS, f"pooling {self.pooling!r} is none of {', '.join(POOLINGS)}")
        _require(0 < self.diffusion_steps <= 1000, f"{self.diffusion_steps} diffusion steps are not 1 to 1000")

    @property
    def text_length(self) -> int:  # type: ignore[override]  # nothing writes it
        """Prompt tokens, padding included: always as many."""
        return self.context_length

    @property
    def text_width(self) -> int:  # type: ignore[override]  # nothing writes it
        """Channels of a text feature."""
        return self.context_width

    @property
    def first_tokens(self) -> int:
        """Tokens of the first scale: the context."""
        return self.context_length


def mlp_width(width: int, ratio: float = 4.0) -> int:
    """Hidden width of the gated feed-forward: two thirds of the ratio, rounded up to a multiple of 256."""
    return int(width * ratio * 2 / 3 + 255) // 256 * 256


# The released configuration was not at hand. Sizes follow from the published programs, their 732 M parameters among
# them; that q and k are normalised, and the context too, is inferred (both leave a trace in a checkpoint).
TRANSFORMERS: dict[str, HartConfig] = {
    "hart_0.7b": HartConfig(
        depth=24,
        width=1536,
        heads=24,
        mlp_width=mlp_width(1536),
        context_length=300,
        context_width=1536,
        codes=4096,
        code_channels=32,
    )
}
# Its hybrid tokenizer is VAR's, on more scales: what the codes leave is the diffusion head's, in the transformer.
IMAGE_TOKENIZER = VqTokenizerConfig(codes=4096, code_channels=32, max_scales=len(PUBLISHED_SCALES))


def _sampling_steps(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    """A text upstream, which may stand for several series of steps."""
    return {"diffusion_steps": int(value) if isinstance(value, str) and value.isdecimal() else value}


_PUBLISHED_NAMES = PublishedNames(
    names={
        "embed_dim": "width",
        "num_heads": "heads",
        "context_token": "context_length",
        "context_dim": "context_width",
        "patch_nums": "scales",
        "attn_l2_norm": "unit_queries",
        "sep_aln_pooling_mode": "pooling",
        "use_timestep_embed": "timestep_levels",
        "use_context_norm": "context_norm",
        "diff_width": "diffusion_width",
        "diff_depth": "diffusion_depth",
    },
    converted={
        "mlp_ratio": mlp_ratio(mlp_width),
        "disable_aln": lambda value, _: {"modulated": not value if isinstance(value, bool) else value},
        "num_sampling_steps": _sampling_steps,
    },
    only={
        "shared_aln": False,
        "attn_type": "llama",
        "mlp_type": "llama",
        "use_cross_attn": False,
        "norm_eps": 1e-6,
        "context_norm_scale": 1.0,
        "sampler": "iddpm",
    },
)


def settings_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a HartConfig that a `config.json` gives: our names, or the published program's.

    Raises:
        CheckpointError: an entry is unknown, of the wrong type, or of a variant that is not supported.
    """
    return settings_from_json(HartConfig, data, _PUBLISHED_NAMES)


def config_from_json(data: dict[str, Any]) -> HartConfig:
    """A whole configuration, under our names or the published program's.

    Raises:
        CheckpointError: a field is unknown, missing or of the wrong type.
    """
    return from_fields(HartConfig, settings_of(data))


# The published pruning (FastVAR, folder HART) goes by token counts: half of the 48x48 tokens are dropped, three
# quarters of the 64x64, in every layer, restored from 36x36.
_KEEP = {(48, 48): 0.5, (64, 64): 0.25}
_CACHED = (36, 36)


def fastvar_policy(schedule: ScaleSchedule, depth: int) -> PruningPolicy:
    """The `fastvar` preset for HART; a schedule without the published scales is not pruned.

    Raises:
        PlanError: scales to prune, but none to restore from (upstream fails while it draws).
    """
    rules = {i: ScaleRule(_KEEP[size]) for i, size in enumerate(schedule.sizes) if size in _KEEP}
    if rules and _CACHED not in schedule.sizes:
        raise PlanError(
            "the published HART policy restores from a 36x36 scale, which this schedule lacks",
            fix="choose another policy",
        )
    cached = schedule.sizes.index(_CACHED) if rules else None
    return PruningPolicy("fastvar", rules, 0, depth, cached)


def guidance_ratio(scale: int, scales: int) -> float:
    """How far through the schedule a scale lies, 0 to 1: guidance grows with it, the smooth temperature falls.

    The last scale keeps what its predecessor had, as the published program leaves it.
    """
    return min(scale, scales - 2) / (scales - 1)


def diffusion_guidance(guidance: float) -> float:
    """Guidance of the diffusion head. At exactly 1 the published program runs it unguided; 0 stands for that."""
    return 0.0 if guidance == 1.0 else guidance


def top_k(scale: int) -> int:
    """Codes a token may draw from. The published program fixes them, whatever its caller asks."""
    return 600 if scale < 7 else 300


HART = Family(
    name="hart",
    transformer=HartConfig,
    image_tokenizer=VqTokenizerConfig,
    transformers=TRANSFORMERS,
    image_tokenizer_for=lambda _: IMAGE_TOKENIZER,
    schedules=own_schedule,
    presets={"dense": dense_policy, "fastvar": fastvar_policy},
    transformer_from_json=config_from_json,
    settings_from_json=settings_of,
    sampling=SamplingDefaults(guidance_scale=4.5, tau=None, top_p=1.0),  # the published sampling script's
    guidance_off=0.0,
    drawings=frozenset({"smooth", "final_iterations", "residual"}),
)
