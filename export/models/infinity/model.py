"""Infinity's transformer in torch, under the official key names (upstream: infinity/models/infinity.py).

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

from ....families.infinity import TRANSFORMERS, TransformerConfig
from ....families.settings import completed
from ..common.rows import layer_norm
from ..common.tensor_shapes import count, dims
from ..transformer.layers import FeedForward, HeadNorm, RmsNorm, SelfAttention
from ..transformer.pruning import LayerState, SubLayer

KIND = "an Infinity transformer"
PATCHIFIED_CHANNELS = 56  # 8B: 14 bits in 2 x 2 cells; no other published model predicts 56


@dataclass
class Conditioning:
    """The inputs of every scale that come from the text. B counts rows: conditional ones first."""

    sos: Tensor  # [B, C] pooled text: the first token, before the start embedding
    text: Tensor  # [B, T, C] source of the cross-attention keys and values
    text_mask: Tensor | None  # [B, T] bool, True where a token counts; None: all do
    modulation: Tensor  # [B, 1, 6, C] shared part of the adaptive layer norm


class TextAttention(nn.Module):
    """Attention to the text, whose keys have a bias of zero."""

    zero_k_bias: Tensor

    def __init__(self, width: int, text_width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.mat_kv = nn.Linear(text_width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def text_kv(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """text [B, T, Ct] -> k, v [B, H, T, hd]; depends on the text alone, so once an image is enough."""
        kv = F.linear(text, self.mat_kv.weight, torch.cat((self.zero_k_bias, self.v_bias)))
        k, v = kv.unflatten(-1, (2, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return k, v


class AttentivePool(TextAttention):
    """A learned query attends over the text tokens, one head per 128 text channels."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.width, config.text_width, config.pool_heads)
        self.mat_q = nn.Parameter(torch.empty(1, self.heads, self.head_dim))

    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        """text [B, T, Ct], mask [B, T] bool or None -> [B, C]."""
        k, v = self.text_kv(text)
        q = self.mat_q.unsqueeze(2).expand(text.shape[0], -1, -1, -1)  # [B, H, 1, hd]
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=_per_query(mask))
        out: Tensor = self.proj(pooled.flatten(1))
        return out


class CrossAttention(TextAttention):
    """Plain scaled attention to the text; no rotary, no cosine."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.width, config.width, config.heads)
        self.mat_q = nn.Linear(config.width, config.width)

    def attn_mlp(self, h: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """h [B, L, C], k, v [B, H, T, hd], mask [B, T] bool or None -> [B, L, C]."""
        q = self.mat_q(h).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)  # [B, H, L, hd]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=_per_query(mask))
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward: three sub-layers on one fp32 residual stream."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.sa = SelfAttention(config, stores_key_bias=True)
        self.ca = CrossAttention(config)
        self.ffn = FeedForward(config)
        self.ca_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))

    def modulation(self, shared: Tensor) -> Tensor:
        """shared [B, 1, 6, C] -> gamma1, gamma2, scale1, scale2, shift1, shift2, stacked [6, B, 1, C]."""
        return (self.ada_gss + shared).permute(2, 0, 1, 3)

    def project_qkv(self, x: Tensor, shared: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Residual tokens [B, L, C] -> q, k, v [B, H, L, hd]."""
        _, _, scale1, _, shift1, _ = self.modulation(shared)
        q, k, v = self.sa.qkv(layer_norm(x) * (1 + scale1) + shift1)
        return rotate(q, rotary), rotate(k, rotary), v

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, shared: Tensor) -> Tensor:
        return self.modulation(shared)[0] * self.sa.attn_mlp(q, k, v)

    def cross_attention(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.ca.attn_mlp(self.ca_norm(x), k, v, mask)

    def feed_forward(self, x: Tensor, shared: Tensor) -> Tensor:
        _, gamma2, _, scale2, _, shift2 = self.modulation(shared)
        return gamma2 * self.ffn(layer_norm(x) * (1 + scale2) + shift2)

    def sub_layers(self, conditioning: Conditioning, rotary: Tensor, state: LayerState) -> dict[str, SubLayer]:
        """The sub-layers in order, for one scale with its rotary [2, L, hd / 2] (see pruning.run_block)."""
        shared, (text_k, text_v) = conditioning.modulation, self.ca.text_kv(conditioning.text)

        def self_attention(tokens: Tensor, kept: Tensor | None) -> Tensor:
            q, k, v = self.project_qkv(tokens, shared, rotary if kept is None else rotary[:, kept])
            return self.self_attention(q, *state.appended(k, v), shared)

        return {
            "sa": self_attention,
            "ca": lambda tokens, _: self.cross_attention(tokens, text_k, text_v, conditioning.text_mask),
            "ffn": lambda tokens, _: self.feed_forward(tokens, shared),
        }


class InfinityTransformer(nn.Module):
    """All weights of the transformer. The loop over scales is in reference.py."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = config
        self.config = config
        self.cfg_uncond = nn.Parameter(torch.zeros(c.text_length, c.text_width))
        self.pos_start = nn.Parameter(torch.zeros(1, 1, c.width))
        self.text_norm = RmsNorm(c.text_width)
        self.text_proj_for_sos = nn.ModuleDict({"ca": AttentivePool(c)})
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(c.text_width, c.width), nn.GELU(approximate="tanh"), nn.Linear(c.width, c.width)
        )
        self.lvl_embed = nn.Embedding(c.max_scales, c.width)
        self.word_embed = nn.Linear(c.code_channels, c.width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 6 * c.width))
        self.head_nm = HeadNorm(c.width)
        self.head = nn.Linear(c.width, 2 * c.code_channels)
        layers = [Block(c) for _ in range(c.depth)]
        if c.chunks == 1:
            self.blocks = nn.ModuleList(layers)
        else:
            n = c.layers_per_chunk
            chunks = (nn.ModuleList(layers[i : i + n]) for i in range(0, c.depth, n))
            self.block_chunks = nn.ModuleList(nn.ModuleDict({"module": chunk}) for chunk in chunks)

    @property
    def layers(self) -> list[Block]:
        """Every block, in order, whatever chunk it is stored in."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def conditioning(self, features: Tensor, mask: Tensor | None) -> Conditioning:
        """Text features [B, T, Ct], mask [B, T] (True = a token; None: all are) -> the condition of every scale."""
        text = self.text_norm(features)
        sos = self.text_proj_for_sos["ca"](text, mask)
        shared = self.shared_ada_lin(sos).view(-1, 1, 6, self.config.width)
        return Conditioning(sos=sos, text=self.text_proj_for_ca(text), text_mask=mask, modulation=shared)

    def first_tokens(self, sos: Tensor) -> Tensor:
        """sos [B, C] -> input of scale 0 [B, 1, C], before the level embedding."""
        return sos.unsqueeze(1) + self.pos_start

    def embed(self, codes: Tensor) -> Tensor:
        """Codes of one scale [B, code_channels, h, w] -> tokens [B, h * w, C], before the level embedding."""
        out: Tensor = self.word_embed(codes.flatten(2).transpose(1, 2))
        return out

    def logits(self, x: Tensor, sos: Tensor) -> Tensor:
        """Residual stream [B, L, C] -> [B, L, 2 * code_channels]: two logits a bit, index 0 then 1."""
        out: Tensor = self.head(self.head_nm(x, sos))
        return out


def _per_query(mask: Tensor | None) -> Tensor | None:
    """[B, T] -> [B, 1, 1, T]. No mask rather than one that hides nothing: masks rule out torch's fastest kernels."""
    return None if mask is None else mask[:, None, None, :]


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the pairs (2j, 2j + 1) of x [B, H, L, hd] by angle j.

    rotary: cosines and sines, [2, L, hd / 2] for all rows or [2, B, L, hd / 2] each row its own.
    """
    cos, sin = rotary if rotary.dim() == 3 else rotary.unsqueeze(2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def infer_transformer(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any] | None = None
) -> TransformerConfig:
    """Sizes of a transformer from its tensors, checked against the settings of a config.json.

    Spatial patchify leaves no trace: without a setting, 56 channels (8B) mean it. The image tokenizer, which reads as
    many bits a cell, tells whether that was right (`InfinityWiring.check_parts`).

    Raises:
        CheckpointError: the tensors are not those of an Infinity transformer, or not those of the settings.
    """
    settings = dict(settings or {})
    chunked = any(name.startswith("block_chunks.") for name in shapes)
    chunks = count(shapes, r"block_chunks\.(\d+)\.", KIND) if chunked else 1
    first = "block_chunks.0.module." if chunked else "blocks."
    layers = count(shapes, re.escape(first) + r"(\d+)\.", KIND)
    width, code_channels = dims(shapes, "word_embed.weight", 2, KIND)
    text_length, text_width = dims(shapes, "cfg_uncond", 2, KIND)
    read = {
        "depth": chunks * layers,
        "width": width,
        "heads": dims(shapes, f"{first}0.sa.scale_mul_1H11", 4, KIND)[1],
        "mlp_width": dims(shapes, f"{first}0.ffn.fc1.weight", 2, KIND)[0],
        "text_width": text_width,
        "text_length": text_length,
        "code_channels": code_channels,
        "chunks": chunks,
        "max_scales": dims(shapes, "lvl_embed.weight", 2, KIND)[0],
    }
    assumed = {"spatial_patchify": code_channels == PATCHIFIED_CHANNELS}
    return completed(TransformerConfig, read, settings, TRANSFORMERS, assumed)
