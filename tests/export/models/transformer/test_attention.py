import sys

import pytest
import torch
from torch import Tensor

from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.export.models.transformer import attention as attention_module
from fastvar.export.models.transformer.attention import attention_override, attn_mlp, flash_attention, torch_attention
from tests.models import tiny_models as tiny


def flash_in_plain_torch(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """flash_attn_func's contract, [B, L, H, hd] in and out, written with a softmax."""
    assert not causal
    assert q.dtype == k.dtype == v.dtype
    scores = torch.einsum("blhd,bshd->bhls", q, k) * softmax_scale
    return torch.einsum("bhls,bshd->blhd", scores.softmax(-1), v)


def qkv(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 3, n, 8, dtype=dtype) for n in (5, 7, 7))


def test_flash_attention_equals_torchs():
    q, k, v = qkv()
    found = flash_attention(q, k, v, 0.3, flash_in_plain_torch)
    torch.testing.assert_close(found, torch_attention(q, k, v, 0.3))


def test_flash_attention_gets_one_element_type():
    """Under autocast queries and keys are fp32 after their norm, values bf16."""
    q, k, v = qkv()
    assert flash_attention(q, k, v.bfloat16(), 1.0, flash_in_plain_torch).dtype == torch.bfloat16


def test_the_reference_draws_the_same_with_either():
    features, mask = tiny.text()

    def last_logits() -> Tensor:
        scales = generate_scales(tiny.model(), features, mask, tiny.plan(), tiny.noise, Sampling())
        return [scale.logits for scale in scales][-1]

    expected, calls = last_logits(), []

    def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        calls.append(q.shape)
        return flash_attention(q, k, v, scale, flash_in_plain_torch)

    with attention_override(flash):
        found = last_logits()
    assert len(calls) == tiny.CONFIG.depth * len(tiny.plan().steps), "every self-attention goes through it"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_override_ends_with_its_block():
    q, k, v = qkv()
    with pytest.raises(ZeroDivisionError), attention_override(lambda *_: 1 / 0):
        attn_mlp(q, k, v, 1.0)
    torch.testing.assert_close(attn_mlp(q, k, v, 1.0), torch_attention(q, k, v, 1.0))


def test_flash_attn_is_not_imported_on_the_cpu(monkeypatch: pytest.MonkeyPatch):
    attention_module._flash.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # an import would fail, and be seen in the cache
    attn_mlp(*qkv(torch.bfloat16), 1.0)
    assert attention_module._flash.cache_info().misses == 0
