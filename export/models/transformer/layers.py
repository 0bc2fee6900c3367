"""Parts that the transformers of several families share, in torch; upstream's programs descend from VAR's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....families.base import TransformerShape
from ..common.rows import layer_norm, rms_norm
from .attention import attn_mlp

MAX_LOG_SCALE = math.log(100.0)  # ceiling of the learned per-head attention scale
QUARTER = 0.25  # of the usual softmax scale, in models without l2-normalised queries, as published


class RmsNorm(nn.Module):
    """RMSNorm in fp32, eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.weight)


class SelfAttention(nn.Module):
    """Attention over all that is cached; under `unit_queries` a cosine attention with a learned scale per head.

    `qkv` is the key of the fused matrix. The key bias is a constant zero, which Infinity's program stores.
    """

    def __init__(
        self, config: TransformerShape, unit_queries: bool = True, qkv: str = "mat_qkv", stores_key_bias: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self._qkv = config.heads, config.head_dim, qkv
        setattr(self, qkv, nn.Linear(config.width, 3 * config.width, bias=False))
        self.q_bias = nn.Parameter(torch.zeros(config.width))
        self.v_bias = nn.Parameter(torch.zeros(config.width))
        if stores_key_bias:
            self.register_buffer("zero_k_bias", torch.zeros(config.width))
        self.scale_mul_1H11: Tensor | None = None
        if unit_queries:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(config.width, config.width)

    def qkv(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed tokens h [B, L, C] -> q, k, v, each [B, H, L, hd], without positions; q carries the softmax scale."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(h, getattr(self, self._qkv).weight, bias).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.scale_mul_1H11 is None:
            return q * (QUARTER / math.sqrt(self.head_dim)), k, v
        q = F.normalize(q, dim=-1, eps=1e-12) * self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()
        return q, F.normalize(k, dim=-1, eps=1e-12), v

    def attn_mlp(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [B, H, L, hd] over k, v [B, H, S, hd] -> [B, L, C]. Without a mask [L, S] (bool) all keys are seen."""
        out = attn_mlp(q, k, v, 1.0) if mask is None else F.scaled_dot_product_attention(q, k, v, mask, scale=1.0)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """Two matrices with a tanh GELU between them."""

    def __init__(self, config: TransformerShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(h), approximate="tanh"))
        return out


class HeadNorm(nn.Module):
    """Layer norm modulated by the pooled prompt or the class: the last norm before the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        scale, shift = self.ada_lin(pooled).unflatten(-1, (2, -1)).permute(1, 0, 2).unsqueeze(2)  # [B, 1, C]
        return layer_norm(x) * (1 + scale) + shift
