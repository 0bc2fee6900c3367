"""Attention of the torch reference: flash-attn on a GPU in 16 bits where it is installed, torch's own elsewhere.

Exported graphs do not use it: their attention is written out (common/rows.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]

_override: Attention | None = None


def attn_mlp(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, H, L, hd] over k, v [B, H, S, hd], no mask -> [B, H, L, hd]."""
    if _override is not None:
        return _override(q, k, v, scale)
    if v.is_cuda and v.dtype in (torch.float16, torch.bfloat16) and _flash() is not None:
        return flash_attention(q, k, v, scale)
    return torch_attention(q, k, v, scale)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, function: Any = None) -> Tensor:
    """flash-attn, which wants [B, L, H, hd] in one 16-bit type. `function` stands in for flash_attn_func in tests."""
    function = function or _flash()
    q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
    out: Tensor = function(q, k, v, softmax_scale=scale, causal=False)
    return out.transpose(1, 2)


@contextmanager
def attention_override(attention: Attention) -> Iterator[None]:
    """Use this attention, whatever is installed."""
    global _override
    before, _override = _override, attention
    try:
        yield
    finally:
        _override = before


@cache
def _flash() -> Any:
    """flash_attn_func, or None where the package is not installed. Imported for the first GPU tensor, not before."""
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except ImportError:
        return None
