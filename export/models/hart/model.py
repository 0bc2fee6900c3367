"""HART's transformer in torch, under the official key names (upstream: hart/modules/models/transformer).

Each sub-layer takes residual tokens and returns the tensor that is added to them, gate included. The dense and the
pruned forward (transformer/pruning.py) differ only in the tokens that go in and in the restoration of the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.schedule import Size
from ....errors import CheckpointError
from ....families.hart import POOLINGS, TRANSFORMERS, HartConfig
from ....families.settings import completed
from ..common.tensor_shapes import count, dims
from ..transformer.layers import RmsNorm, SelfAttention
from ..transformer.pruning import LayerState, SubLayer, gather
from .diffusion import DiffusionNet, NumberEmbedding

KIND = "a HART transformer"
ROTARY_BASE = 10000.0
# Buffers that a checkpoint may hold and that are made anew: constants of the schedule, and a bias of zeros.
DERIVED = re.compile(r"(lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias)$")

Shapes = Mapping[str, tuple[int, ...]]


@dataclass
class Conditioning:
    """The inputs of every scale that come from the text. B counts rows: conditional ones first."""

    context: Tensor  # [B, Nc, C] the tokens of scale 0, before the level embedding
    positions: Tensor  # [B, Nc] their rotary positions
    head: Tensor  # [B, 2, 1, C] scale and shift of the head's norm
    pooled: Tensor | None  # [B, C] what modulates the blocks; None: nothing does

    @property
    def offset(self) -> Tensor:
        """[B]: added to the rotary positions of every image token."""
        return self.positions[:, -1]


class FeedForward(nn.Module):
    def __init__(self, config: HartConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Block(nn.Module):
    """Self-attention and feed-forward. One norm serves both; in spite of its key, it is learned."""

    def __init__(self, config: HartConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(config, config.unit_queries, "qkv_proj")
        self.ffn = FeedForward(config)
        self.ln_wo_grad = RmsNorm(config.width)
        self.ada_lin: nn.Sequential | None = None
        if config.modulated:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    def modulation(self, pooled: Tensor | None) -> Tensor | None:
        """pooled [B, C] -> gamma1, gamma2, scale1, scale2, shift1, shift2, [6, B, 1, C]; None: a plain block."""
        if self.ada_lin is None:
            return None
        return self.ada_lin(pooled).unflatten(-1, (6, -1)).transpose(0, 1).unsqueeze(2)

    def normed(self, x: Tensor, modulation: Tensor | None, sub_layer: int) -> Tensor:
        """Residual tokens [B, L, C] as sub-layer 0 (attention) or 1 (feed-forward) takes them."""
        h = self.ln_wo_grad(x)
        return h if modulation is None else h * (1 + modulation[2 + sub_layer]) + modulation[4 + sub_layer]

    def project_qkv(self, x: Tensor, modulation: Tensor | None, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual tokens [B, L, C] -> q, k, v [B, H, L, hd]."""
        q, k, v = self.attn.qkv(self.normed(x, modulation, 0))
        return rotate(q, rotary), rotate(k, rotary), v

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, modulation: Tensor | None) -> Tensor:
        out = self.attn.attn_mlp(q, k, v)
        return out if modulation is None else modulation[0] * out

    def feed_forward(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        out = self.ffn(self.normed(x, modulation, 1))
        return out if modulation is None else modulation[1] * out

    def sub_layers(self, conditioning: Conditioning, rotary: Tensor, state: LayerState) -> dict[str, SubLayer]:
        """The sub-layers in order, for one scale with its rotary [2, B, L, hd] (see pruning.run_block)."""
        modulation = self.modulation(conditioning.pooled)

        def self_attention(tokens: Tensor, kept: Tensor | None) -> Tensor:
            q, k, v = self.project_qkv(tokens, modulation, rotary if kept is None else rotary_of(rotary, kept))
            return self.self_attention(q, *state.appended(k, v), modulation)

        return {"sa": self_attention, "ffn": lambda tokens, _: self.feed_forward(tokens, modulation)}


class HeadNorm(nn.Module):
    """A learned RMSNorm, then scale and shift from the context."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_wo_grad = RmsNorm(width)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, pooled: Tensor) -> Tensor:
        """pooled [B, C] -> scale, shift [B, 2, 1, C]."""
        return self.ada_lin(pooled).unflatten(-1, (2, -1)).unsqueeze(2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = modulation.unbind(1)
        return self.ln_wo_grad(x) * (1 + scale) + shift


class HartTransformer(nn.Module):
    """Context embedding, blocks, head and diffusion head. The image tokenizer is no part of it."""

    def __init__(self, config: HartConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embed = nn.Linear(config.code_channels, config.width)
        self.context_embed = nn.Linear(config.context_width, config.width)
        self.context_norm = RmsNorm(config.context_width) if config.context_norm else None
        self.lvl_embed: nn.Module = (
            NumberEmbedding(config.width) if config.timestep_levels else nn.Embedding(len(config.scales), config.width)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(config.width)
        self.head = nn.Linear(config.width, config.codes)
        self.decoder_norm = RmsNorm(config.width)
        self.diffloss = nn.ModuleDict({"net": DiffusionNet(config)})

    @property
    def layers(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]  # a module list does not know of what

    def conditioning(self, features: Tensor, mask: Tensor, positions: Tensor) -> Conditioning:
        """Text features [B, Nc, Ct], mask [B, Nc] (True: a token), positions [B, Nc] -> what every scale needs.

        The mask counts in "avg" pooling alone. The head takes the maximum over all tokens, padding included, whatever
        the pooling is.
        """
        context = self.context_embed(features if self.context_norm is None else self.context_norm(features))
        largest = context.amax(dim=1)
        pooled = self._pooled(context, mask, largest) if self.config.modulated else None
        return Conditioning(context, positions, self.head_nm.modulation(largest), pooled)

    def _pooled(self, context: Tensor, mask: Tensor, largest: Tensor) -> Tensor:
        if self.config.pooling == "max":
            return largest
        counted = mask.unsqueeze(-1).to(context.dtype)
        return (context * counted).sum(1) / counted.sum(1)

    def level(self, scale: int) -> Tensor:
        """Level embedding [1, C] of a scale."""
        return self.lvl_embed(torch.tensor([scale]))

    def embed(self, codes: Tensor) -> Tensor:
        """Summed codes of one scale [B, Cv, h, w] -> tokens [B, h * w, C], before the level embedding."""
        return self.word_embed(codes.flatten(2).transpose(1, 2))

    def logits(self, x: Tensor, conditioning: Conditioning) -> Tensor:
        """Residual stream [B, L, C] -> [B, L, codes]."""
        return self.head(self.head_nm(x, conditioning.head))

    def diffusion_condition(self, x: Tensor, embedded: Tensor) -> Tensor:
        """Last block's output and the drawn codes' embeddings, [B, L, C] and [B, L, Cv] -> rows [B * L, C]."""
        return self.decoder_norm(x + self.word_embed(embedded)).flatten(0, 1)


def context_rotary(positions: Tensor, head_dim: int) -> Tensor:
    """Cosines and sines of context tokens at positions [B, Nc]: [2, B, Nc, hd], angles repeated for both halves."""
    return _cos_sin((positions.float().unsqueeze(-1) * _frequencies(head_dim)).repeat(1, 1, 2))


def image_rotary(size: Size, final: Size, offset: Tensor, head_dim: int) -> Tensor:
    """Cosines and sines of an h x w scale's tokens, offset [B] added to their rows and columns: [2, B, h * w, hd].

    Rows give the angles of the first half of a head, columns those of the second, frequencies alike. `rotate` pairs
    the halves, so a pair is turned by two different angles: no rotation, but what the model was trained with.
    """
    rows, columns = (torch.arange(n) / n * end for n, end in zip(size, final, strict=True))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)  # [L, 2]
    positions = grid + offset.float()[:, None, None]  # [B, L, 2]
    angles = positions.unsqueeze(-1) * _frequencies(head_dim // 2)  # [B, L, 2, hd / 4]
    return _cos_sin(angles.repeat(1, 1, 1, 2).flatten(2))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x [B, H, L, hd] by cosines and sines [2, B, L, hd]: x * cos + (-second half, first half) * sin."""
    cos, sin = rotary.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotary_of(rotary: Tensor, tokens: Tensor) -> Tensor:
    """Cosines and sines [2, B, L, hd] of the tokens [B, k]: [2, B, k, hd]."""
    return torch.stack([gather(part, tokens) for part in rotary])


def _frequencies(channels: int) -> Tensor:
    return 1.0 / ROTARY_BASE ** (torch.arange(0, channels, 2).float() / channels)


def _cos_sin(angles: Tensor) -> Tensor:
    return torch.stack((angles.cos(), angles.sin()))


def infer_transformer(shapes: Shapes, settings: Mapping[str, Any] | None = None) -> HartConfig:
    """Sizes of a transformer from its tensors; what leaves no trace comes from the settings of a config.json.

    Scales and context length leave none, nor do heads without l2-normalised queries, nor how modulated blocks pool the
    context: those of the published model are taken where all the rest is as published, and asked for elsewhere.

    Raises:
        CheckpointError: the tensors are not those of a HART transformer, not those of the settings, or neither say what
            the model needs.
    """
    settings = dict(settings or {})
    if any(".ada_gss" in name or name.startswith("shared_ada_lin") for name in shapes):
        raise CheckpointError("HART with one modulation shared by all blocks is not supported", expected="its own each")
    width, code_channels = dims(shapes, "word_embed.weight", 2, KIND)
    scale_mul = "blocks.0.attn.scale_mul_1H11"
    read: dict[str, Any] = {
        "depth": count(shapes, r"blocks\.(\d+)\.", KIND),
        "width": width,
        "mlp_width": dims(shapes, "blocks.0.ffn.gate_proj.weight", 2, KIND)[0],
        "context_width": dims(shapes, "context_embed.weight", 2, KIND)[1],
        "codes": dims(shapes, "head.weight", 2, KIND)[0],
        "code_channels": code_channels,
        "unit_queries": scale_mul in shapes,
        "modulated": "blocks.0.ada_lin.1.weight" in shapes,
        "timestep_levels": "lvl_embed.weight" not in shapes,
        "context_norm": "context_norm.weight" in shapes,
        "diffusion_width": dims(shapes, "diffloss.net.input_proj.weight", 2, KIND)[0],
        "diffusion_depth": count(shapes, r"diffloss\.net\.res_blocks\.(\d+)\.", KIND),
    }
    if read["unit_queries"]:
        read["heads"] = dims(shapes, scale_mul, 4, KIND)[1]
    levels, tokens = _stored_schedule(shapes)
    if "scales" in settings and tokens:
        read["context_length"] = tokens - _image_tokens(settings["scales"])
    # Diffusion steps are chosen by who draws; what pooling gives modulates blocks, and nothing else.
    otherwise: dict[str, Any] = {"diffusion_steps": HartConfig.diffusion_steps}
    otherwise |= {} if read["modulated"] else {"pooling": POOLINGS[0]}
    scales = settings.get("scales", TRANSFORMERS["hart_0.7b"].scales)
    if levels in (0, len(scales)) and (not tokens or tokens > _image_tokens(scales)):
        config = completed(HartConfig, read, settings, TRANSFORMERS, otherwise)
        if tokens in (0, config.context_length + _image_tokens(config.scales)):
            return config
    raise CheckpointError(
        f"the transformer was made for {levels or len(scales)} scales" + (f" and {tokens} tokens" if tokens else ""),
        expected=f"scales {list(scales)}",
        fix='give the side of every token grid: "scales": [1, 2, ...] in config.json beside the transformer',
    )


def _stored_schedule(shapes: Shapes) -> tuple[int, int]:
    """Rows of the level table, and tokens of all scales, the context included; 0 for what is not stored."""
    levels = dims(shapes, "lvl_embed.weight", 2, KIND)[0] if "lvl_embed.weight" in shapes else 0
    return levels, dims(shapes, "lvl_1L", 2, KIND)[1] if "lvl_1L" in shapes else 0


def _image_tokens(scales: tuple[int, ...]) -> int:
    """Tokens of all scales but the first, whose place the context takes."""
    return sum(side * side for side in scales[1:])
