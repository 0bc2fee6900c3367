"""The sizes of Infinity models, as frozen nouns: no weights, no torch, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.schedule import ScaleSchedule, Size
from ..errors import CheckpointError
from .base import Family, ImageTokenizerShape, TransformerShape, from_fields
from .infinity_presets import PRESETS, all_schedules, shapes
from .settings import PublishedNames, mlp_ratio, settings_from_json


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise CheckpointError(f"invalid model configuration: {problem}")


@dataclass(frozen=True)
class TransformerConfig(TransformerShape):
    """Sizes of an Infinity transformer (upstream: infinity/models/infinity.py).

    `code_channels` is what one token predicts, in bits: those of a tokenizer cell, times four under patchify.
    """

    depth: int
    width: int
    heads: int
    mlp_width: int
    text_width: int
    text_length: int  # longest prompt in tokens; rows of the learned unconditional text
    code_channels: int
    chunks: int = 1  # layers are stored in chunks under the official key names
    max_scales: int = 15  # rows of the level embedding: the longest schedule
    spatial_patchify: bool = False
    classes = 0  # none are read

    def __post_init__(self) -> None:
        _require(self.depth > 0 and self.width > 0 and self.heads > 0, "depth, width and heads must be positive")
        _require(self.chunks > 0, f"{self.depth} layers do not divide into {self.chunks} chunks")
        _require(
            self.width % self.heads == 0,
            f"width {self.width} does not divide into {self.heads} attention heads",
        )
        _require(self.head_dim % 4 == 0, f"head size {self.head_dim} must be a multiple of 4 for 2-D rotary")
        _require(self.depth % self.chunks == 0, f"{self.depth} layers do not divide into {self.chunks} chunks")
        _require(self.text_width >= 128, f"text width {self.text_width} is under 128: no pooling head")
        _require(self.width % self.pool_heads == 0, "width does not divide into the pooling heads")

    @property
    def pool_heads(self) -> int:
        """Heads of the attentive pooling: one per 128 text channels, per 64 in models wider than 4096."""
        return self.text_width // (64 if self.width > 4096 else 128)

    @property
    def layers_per_chunk(self) -> int:
        return self.depth // self.chunks

    @property
    def patch(self) -> int:
        """Tokenizer grid cells along one side of a token."""
        return 2 if self.spatial_patchify else 1

    @property
    def bits(self) -> int:
        """Bits of one tokenizer grid cell."""
        return self.code_channels // self.patch**2


@dataclass(frozen=True)
class ImageTokenizerConfig(ImageTokenizerShape):
    """Sizes of the multi-scale binary-spherical image tokenizer (upstream: infinity/models/bsq_vae)."""

    bits: int
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    residual_blocks: int = 2

    def __post_init__(self) -> None:
        for channels in self.level_channels:
            _require(
                channels % 32 == 0 or channels % 24 == 0,
                f"{channels} channels do not divide into 32 or 24 normalisation groups",
            )

    @property
    def code_channels(self) -> int:  # type: ignore[override]  # nothing writes it
        """Channels of the latent that the decoder reads."""
        return self.bits


def mlp_width(width: int, ratio: float = 4.0) -> int:
    """Hidden width of the feed-forward: a multiple of 256, ties to even as upstream's `round` does."""
    return round(ratio * width / 256) * 256


def _infinity(
    depth: int, width: int, heads: int, chunks: int, channels: int = 32, patchify: bool = False
) -> TransformerConfig:
    return TransformerConfig(
        depth=depth,
        width=width,
        heads=heads,
        mlp_width=mlp_width(width),
        text_width=2048,
        text_length=512,
        code_channels=channels,
        chunks=chunks,
        spatial_patchify=patchify,
    )


# Upstream's named sizes (infinity/models/infinity.py and its training scripts).
TRANSFORMERS: dict[str, TransformerConfig] = {
    "infinity_layer12": _infinity(12, 768, 8, 4),
    "infinity_layer16": _infinity(16, 1152, 12, 4),
    "infinity_layer24": _infinity(24, 1536, 16, 4),
    "infinity_2b": _infinity(32, 2048, 16, 8),
    "infinity_layer32": _infinity(32, 2080, 20, 4),
    "infinity_layer40": _infinity(40, 2688, 24, 4),
    "infinity_layer48": _infinity(48, 3360, 28, 4),
    "infinity_8b": _infinity(40, 3584, 28, 8, channels=56, patchify=True),
}


def image_tokenizer_for(transformer: TransformerConfig) -> ImageTokenizerConfig:
    """The published tokenizer that goes with a transformer: 16 pixels a cell, or 8 under spatial patchify."""
    multipliers = (1, 2, 4, 4) if transformer.spatial_patchify else (1, 2, 4, 4, 4)
    return ImageTokenizerConfig(bits=transformer.bits, channel_multipliers=multipliers)


_PUBLISHED_NAMES = PublishedNames(
    names={
        "embed_dim": "width",
        "num_heads": "heads",
        "text_channels": "text_width",
        "text_maxlen": "text_length",
        "d_vae": "code_channels",
        "block_chunks": "chunks",
    },
    converted={
        "mlp_ratio": mlp_ratio(mlp_width),
        "apply_spatial_patchify": lambda value, _: {"spatial_patchify": bool(value) if value in (0, 1) else value},
    },
    only={
        "rms_norm": False,
        "norm_eps": 1e-6,
        "shared_aln": True,
        "head_aln": True,
        "head_depth": 1,
        "cos_attn": True,
        "swiglu": False,
        "nm0": False,
        "use_bit_label": 1,
        "cross_attn_layer_scale": -1.0,
        "add_lvl_embeding_only_first_block": 1,  # as upstream spells it
        "rope2d_each_sa_layer": 1,
        "rope2d_normalized_by_hw": 2,
    },
)


def settings_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a TransformerConfig that a `config.json` gives, under our names or the published program's.

    Raises:
        CheckpointError: an entry is unknown, of the wrong type, or of a variant that is not supported.
    """
    return settings_from_json(TransformerConfig, data, _PUBLISHED_NAMES)


def transformer_from_json(data: dict[str, Any]) -> TransformerConfig:
    """A whole configuration, under our names or the published program's.

    Raises:
        CheckpointError: a field is unknown, missing or of the wrong type.
    """
    return from_fields(TransformerConfig, settings_of(data))


def _schedules(_transformer: TransformerConfig) -> dict[Size, ScaleSchedule]:
    return all_schedules()


INFINITY = Family(
    name="infinity",
    transformer=TransformerConfig,
    image_tokenizer=ImageTokenizerConfig,
    transformers=TRANSFORMERS,
    image_tokenizer_for=image_tokenizer_for,
    schedules=_schedules,
    presets=PRESETS,
    transformer_from_json=transformer_from_json,
    settings_from_json=settings_of,
    attends_to_text=True,
    default_size=(1024, 1024),
    shapes=shapes,
)
