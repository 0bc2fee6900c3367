"""VAR's class-conditional transformer in torch, under the official key names (upstream: VAR, models/var.py and
models/basic_var.py).

Each sub-layer takes residual tokens and returns the tensor that is added to them, gate included. The dense and the
pruned forward (transformer/pruning.py) differ only in the tokens that go in and in the restoration of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import CheckpointError
from ....families.settings import completed, tell_assumed
from ....families.var import SCALES_256, SCALES_512, TRANSFORMERS, VarConfig
from ..common.rows import layer_norm
from ..common.tensor_shapes import count, dims
from ..transformer.layers import FeedForward, HeadNorm, SelfAttention
from ..transformer.pruning import LayerState, SubLayer

KIND = "a VAR transformer"
SCALE_MUL = "blocks.0.attn.scale_mul_1H11"
# Buffers that upstream stores but makes itself: the mask of its training forward, each token's scale, a bias of zeros.
DERIVED = re.compile(r"(attn_bias_for_masking|lvl_1L|blocks\.\d+\.attn\.zero_k_bias)$")


@dataclass
class Conditioning:
    """The inputs of every scale that come from the class. B counts rows: conditional ones first."""

    embedding: Tensor  # [B, C]
    modulation: Tensor | None  # [B, 1, 6, C] shared part of the adaptive layer norm, in models that have one


class Block(nn.Module):
    """Self-attention and feed-forward: two sub-layers on one fp32 residual stream."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(config, config.unit_queries)
        self.ffn = FeedForward(config)
        if config.shared_modulation:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def modulation(self, conditioning: Conditioning) -> Tensor:
        """gamma1, gamma2, scale1, scale2, shift1, shift2, stacked [6, B, 1, C]."""
        if conditioning.modulation is not None:
            return (self.ada_gss + conditioning.modulation).permute(2, 0, 1, 3)
        own: Tensor = self.ada_lin(conditioning.embedding)
        return own.unflatten(-1, (6, 1, -1)).transpose(0, 1)

    def project_qkv(self, x: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        """Residual tokens [B, L, C] -> q, k, v [B, H, L, hd]."""
        _, _, scale1, _, shift1, _ = self.modulation(conditioning)
        return self.attn.qkv(layer_norm(x) * (1 + scale1) + shift1)

    def self_attention(
        self, q: Tensor, k: Tensor, v: Tensor, conditioning: Conditioning, mask: Tensor | None = None
    ) -> Tensor:
        return self.modulation(conditioning)[0] * self.attn.attn_mlp(q, k, v, mask)

    def feed_forward(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        _, gamma2, _, scale2, _, shift2 = self.modulation(conditioning)
        return gamma2 * self.ffn(layer_norm(x) * (1 + scale2) + shift2)

    def sub_layers(self, conditioning: Conditioning, positions: None, state: LayerState) -> dict[str, SubLayer]:
        """The sub-layers in order (see pruning.run_block); positions are in the tokens."""

        def self_attention(tokens: Tensor, _: Tensor | None) -> Tensor:
            q, k, v = self.project_qkv(tokens, conditioning)
            return self.self_attention(q, *state.appended(k, v), conditioning)

        return {"sa": self_attention, "ffn": lambda tokens, _: self.feed_forward(tokens, conditioning)}


class VarTransformer(nn.Module):
    """All weights of the transformer. The loop over scales is in reference.py."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        c = config
        self.config = config
        self.pos_start = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, c.tokens, c.width))
        self.word_embed = nn.Linear(c.code_channels, c.width)
        self.class_emb = nn.Embedding(c.classes + 1, c.width)
        self.lvl_embed = nn.Embedding(c.max_scales, c.width)
        if c.shared_modulation:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 6 * c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.head_nm = HeadNorm(c.width)
        self.head = nn.Linear(c.width, c.codes)

    @property
    def layers(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]  # a module list does not know of what

    def conditioning(self, labels: Tensor) -> Conditioning:
        """Classes [B] (int64; `config.classes` stands for none) -> the condition of every scale."""
        embedding = self.class_emb(labels)
        if not self.config.shared_modulation:
            return Conditioning(embedding, None)
        return Conditioning(embedding, self.shared_ada_lin(embedding).view(-1, 1, 6, self.config.width))

    def first_tokens(self, conditioning: Conditioning) -> Tensor:
        """Input of scale 0 [B, 1, C], before level and position embedding."""
        return conditioning.embedding.unsqueeze(1) + self.pos_start

    def embed(self, codes: Tensor) -> Tensor:
        """A latent at a scale's size [B, code_channels, h, w] -> tokens [B, h * w, C], before level and position."""
        out: Tensor = self.word_embed(codes.flatten(2).transpose(1, 2))
        return out

    def place(self, scale: int) -> Tensor:
        """Level and position embedding of a scale [1, L, C], added to its tokens before the first block."""
        positions = self.pos_1LC[:, self.config.first_token(scale) : self.config.first_token(scale + 1)]
        return positions + self.lvl_embed.weight[scale]

    def logits(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Residual stream [B, L, C] -> [B, L, codes]."""
        out: Tensor = self.head(self.head_nm(x, conditioning.embedding))
        return out


def infer_transformer(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any] | None = None) -> VarConfig:
    """Sizes of a transformer from its tensors; what leaves no trace comes from the settings of a config.json.

    Heads leave none without l2-normalised queries. Of the scales, the tensors tell how many there are, and how many
    tokens they have together: where that is what a published schedule has, it is taken for it.

    Raises:
        CheckpointError: the tensors are not those of a VAR transformer, not those of the settings, or do not say its
            heads or scales while the settings do not either.
    """
    settings = dict(settings or {})
    width, code_channels = dims(shapes, "word_embed.weight", 2, KIND)
    read: dict[str, Any] = {
        "depth": count(shapes, r"blocks\.(\d+)\.", KIND),
        "width": width,
        "mlp_width": dims(shapes, "blocks.0.ffn.fc1.weight", 2, KIND)[0],
        "classes": dims(shapes, "class_emb.weight", 2, KIND)[0] - 1,
        "codes": dims(shapes, "head.weight", 2, KIND)[0],
        "code_channels": code_channels,
        "shared_modulation": "shared_ada_lin.1.weight" in shapes,
        "unit_queries": SCALE_MUL in shapes,
    }
    if read["unit_queries"]:
        read["heads"] = dims(shapes, SCALE_MUL, 4, KIND)[1]
    read["scales"] = _scales(shapes, settings.get("scales"))
    config = completed(VarConfig, read, settings, TRANSFORMERS)
    if "scales" not in settings and config not in TRANSFORMERS.values():
        tell_assumed(f"the scales of the transformer are taken to be the published {list(config.scales)}", "scales")
    return config


def _scales(shapes: Mapping[str, tuple[int, ...]], given: tuple[int, ...] | None) -> tuple[int, ...]:
    """The schedule that is given, or published, and has the tokens and levels of the tensors."""
    found = dims(shapes, "pos_1LC", 3, KIND)[1], dims(shapes, "lvl_embed.weight", 2, KIND)[0]
    for scales in (SCALES_256, SCALES_512) if given is None else (given,):
        if found == (sum(side * side for side in scales), len(scales)):
            return scales
    what = f"the transformer has {found[0]} tokens in {found[1]} scales"
    if given is not None:
        raise CheckpointError(
            f"{what}, its configuration says scales {list(given)}",
            fix="give the config.json that belongs to this checkpoint",
        )
    raise CheckpointError(
        f"{what}, which are not those of a published one",
        expected=f"scales {list(SCALES_256)} or {list(SCALES_512)}",
        fix='give the side of every token grid: "scales": [1, 2, ...] in config.json beside the transformer',
    )
