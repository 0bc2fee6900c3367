import pytest
import torch
from torch import Tensor

from fastvar.engines.aotinductor.native import AVX512_BF16, cpu_lacks
from fastvar.engines.aotinductor.operators import supports_heads

MASKED = -1e30


def operands(L: int, S: int, heads: int, head_dim: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(L + S + head_dim)
    q, keys, values = (torch.randn(n, heads, head_dim, generator=generator) for n in (L, S, S))
    return (q * spread / head_dim**0.5).bfloat16(), keys.bfloat16(), values.bfloat16()


def mask(heads: int, S: int) -> Tensor:
    """Padding behind a different number of keys for each head."""
    kept = 1 + torch.arange(heads)[:, None, None] * (S - 1) // heads
    return torch.where(torch.arange(S) < kept, 0.0, MASKED)


def weighted(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q keys^T + bias) values in fp32."""
    scores = q.float().transpose(0, 1) @ keys.float().permute(1, 2, 0)
    scores = scores if bias is None else scores + bias
    return (torch.softmax(scores, dim=-1) @ values.float().transpose(0, 1)).transpose(0, 1)


SIZES = [
    (1, 1, 1, 16),
    (2, 5, 3, 32),
    (7, 33, 2, 96),
    (5, 63, 3, 80),
    (53, 130, 2, 64),
    (49, 515, 2, 128),
    (3, 1100, 1, 256),
]


@pytest.mark.parametrize("spread", [1, 40])  # even weights, and few keys that take all
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("L", "S", "heads", "head_dim"), SIZES)
def test_equals_softmax_attention_in_fp32(attention, L, S, heads, head_dim, masked, spread):
    q, keys, values = operands(L, S, heads, head_dim, spread)
    bias = mask(heads, S) if masked else None
    # bfloat16 has 8 significant bits: rounding changes a weight, and then the result, by up to 2^-8 of itself. The
    # bound is the sum of both, as if no two errors cancelled; 1e-5 is for sums in fp32, larger where scores are.
    bound = (2**-7 + 1e-5 * spread) * weighted(q, keys, values.abs(), bias)
    error = (attention(q, keys, values, bias, False).float() - weighted(q, keys, values, bias)).abs()
    assert (error <= bound).all()


STRIP, BLOCK = 64, 512  # keys that share a scale; keys whose values do, and whose largest probability is 255


def rounded(x: Tensor, most: Tensor) -> Tensor:
    """To multiples of `most` / 127."""
    most = most.clamp(min=1e-30)
    inverse = torch.full_like(most, 127) / most  # torch has 127 * (1 / most) for 127 / most
    return (x.float() * inverse).round() * (most / 127)


def as_int8(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries rounded row by row, keys strip by strip, values channel by channel in each block."""
    magnitude = [q.float().abs().amax(-1, keepdim=True)]
    strips = [rounded(strip, strip.float().abs().amax(dim=(0, 2), keepdim=True)) for strip in keys.split(STRIP)]
    blocks = [rounded(block, block.float().abs().amax(dim=0, keepdim=True)) for block in values.split(BLOCK)]
    return rounded(q, *magnitude), torch.cat(strips), torch.cat(blocks)


def weighted_in_255ths(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q keys^T + bias) values, the weights of each row and block as whole 255ths of the largest."""
    scores = (q.float().transpose(0, 1) @ keys.float().permute(1, 2, 0)).double()
    scores = scores if bias is None else scores + bias
    dither = 0.998 * (torch.arange(BLOCK, dtype=torch.double) * 0.6180339887498949 % 1) - 0.499
    total, weight = torch.zeros(*scores.shape[:2], values.shape[-1], dtype=torch.double), 0.0
    for scored, block in zip(scores.split(BLOCK, dim=-1), values.double().split(BLOCK), strict=True):
        largest = scored.amax(-1, keepdim=True)
        whole = (255 * (scored - largest).exp() + dither[: len(block)]).round()
        whole = whole * (largest - scores.amax(-1, keepdim=True)).exp()
        total, weight = total + whole @ block.transpose(0, 1), weight + whole.sum(-1, keepdim=True)
    return (total / weight).transpose(0, 1).float()


@pytest.mark.parametrize("spread", [1, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("L", "S", "heads", "head_dim"), SIZES)
def test_int8_attention_is_that_of_rounded_operands(attention, L, S, heads, head_dim, masked, spread):
    q, keys, values = operands(L, S, heads, head_dim, spread)
    keys[0] = 0  # has no scale of its own
    q[-1] = 0
    bias = mask(heads, S) if masked else None
    operand = as_int8(q, keys, values)
    # A weight near a half may differ by one: the kernel's power of two is within 0.03 of 255 times the true one.
    found, expected = attention(q, keys, values, bias, True).float(), weighted_in_255ths(*operand, bias)
    assert (found - expected).abs().max() < 0.02 * values.float().abs().max()
    assert (found - expected).square().mean().sqrt() < 0.003 * expected.square().mean().sqrt() + 1e-6


def test_many_small_probabilities_outweigh_a_large_one(attention):
    """2,000 keys of a 600th each beside one of 1: rounded to the nearest 255th they would be nothing."""
    S, head_dim = 2001, 64
    keys, values = torch.zeros(S, 1, head_dim), torch.ones(S, 1, head_dim)
    keys[0, 0, 0], values[0] = 1.0, -1.0
    q = torch.zeros(1, 1, head_dim)
    q[..., 0] = 6.375  # exp(6.375) = 587
    q, keys, values = q.bfloat16(), keys.bfloat16(), values.bfloat16()
    exact = weighted(q, keys, values, None)
    assert exact.mean() > 0.5
    torch.testing.assert_close(attention(q, keys, values, None, True).float(), exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("where", [0, 63, 69])
@pytest.mark.parametrize("int8", [False, True])
def test_what_is_no_number_is_not_swallowed(attention, int8, where):
    q, keys, values = operands(5, 70, 2, 64)
    keys[where, 1, 3] = torch.nan
    found = attention(q, keys, values, None, int8)
    assert found[:, 0].isfinite().all()
    assert found[:, 1].isnan().all()
    q, keys, values = operands(5, 70, 2, 64)
    values[where, 1, 3] = torch.nan
    found = attention(q, keys, values, None, int8)
    assert found[:, 1, 3].isnan().all()
    assert found.isnan().sum() == 5


@pytest.mark.parametrize("spread", [1, 10])
def test_int8_attention_costs_little(attention, spread):
    """Of cosine attention: queries and keys of unit length, times what the model has learned."""
    q, keys, values = operands(100, 2000, 3, 64)
    q, keys = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (q, keys))
    q, keys = (q * spread).bfloat16(), keys.bfloat16()
    exact = weighted(q, keys, values, None)
    errors = [(attention(q, keys, values, None, int8).float() - exact).square().mean() for int8 in (False, True)]
    # Values alone lose 0.8 %: their largest is 3.3 times their root mean square, and 1 / 127 of it is rounded to.
    assert errors[1].sqrt() / exact.square().mean().sqrt() < 0.008 + 0.002 * spread
    assert errors[1] > errors[0], "it is int8"


@pytest.mark.parametrize("int8", [False, True])
def test_rounds_no_further_than_it_says(attention, int8):
    """With equal weights and small whole numbers as values nothing but the result is rounded."""
    keys = torch.randn(64, 2, 16).bfloat16()
    values = torch.randint(-127, 128, (64, 2, 16)).bfloat16()
    values[5] = 127
    got = attention(torch.zeros(3, 2, 16, dtype=torch.bfloat16), keys, values, None, int8)
    exact = values.double().mean(0).expand(3, -1, -1)
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_same_bits_for_any_number_of_threads(attention, int8):
    q, keys, values = operands(101, 300, 3, 32)  # 9 blocks of queries: two threads share a head
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(attention(q, keys, values, mask(3, 300), int8))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("int8", [False, True])
def test_a_query_does_not_see_which_others_there_are(attention, int8):
    q, keys, values = operands(70, 600, 2, 96)
    together = attention(q, keys, values, None, int8)
    for i in (0, 5, 47, 48, 69):
        assert torch.equal(attention(q[i : i + 1], keys, values, None, int8)[0], together[i])


def test_masked_keys_are_as_if_they_were_not_there(attention):
    q, keys, values = operands(9, 90, 2, 64)
    bias = torch.zeros(2, 1, 90)
    bias[..., 41:] = MASKED
    values[41:] = 1e30
    assert torch.equal(attention(q, keys, values, bias, False), attention(q, keys[:41], values[:41], None, False))


@pytest.mark.parametrize("int8", [False, True])
def test_reads_slices_of_a_cache_in_place(attention, int8):
    q, keys, values = operands(9, 40, 4, 32)
    parts = (q[:, 1:3], keys[:31, 1:3], values[:31, 1:3], mask(4, 31)[1:3])
    got = attention(*parts, int8)
    assert got.is_contiguous()
    assert torch.equal(got, attention(*(part.contiguous() for part in parts), int8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[..., :24], k[..., :24], v[..., :24], None), "heads of 24"),
        (lambda q, k, v: (q.float(), k.float(), v.float(), None), "float32"),
        (lambda q, k, v: (q, k[:, :1], v, None), r"keys \[5, 1, 32\]"),
        (lambda q, k, v: (q, k[:0], v[:0], None), r"keys \[0, 2, 32\]"),
        (lambda q, k, v: (q, k, v, torch.zeros(2, 3, 5)), r"bias \[2, 3, 5\]"),
        (lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v, None), "contiguous last axis"),
    ],
)
def test_refuses_what_the_kernel_cannot_take(attention, change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*operands(3, 5, 2, 32)), False)


def test_says_which_programs_and_processors_it_is_for(tmp_path):
    assert [size for size in (8, 16, 24, 64, 96, 128, 256, 272) if supports_heads(size)] == [
        *(16, 64, 96, 128, 256),
    ]
    assert not supports_heads(64, "float32")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : x\nflags\t\t: fpu avx512f avx512bw avx512dq avx512vl avx512_vnni\n")
    assert cpu_lacks(AVX512_BF16, cpuinfo) == ("avx512_bf16",)
    assert cpu_lacks(AVX512_BF16, tmp_path / "none") == AVX512_BF16
