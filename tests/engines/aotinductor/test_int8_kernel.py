import pytest
import torch
from torch import Tensor

from fastvar.engines.aotinductor import operators
from fastvar.errors import BackendError
from fastvar.export.models.common.quantise import integer_linear

Layer = tuple[Tensor, Tensor, Tensor, Tensor]  # x, values, scale, bias


def operands(M: int, K: int, N: int) -> Layer:
    """Rows of different magnitudes; results mostly around 1, where the GELU bends."""
    generator = torch.Generator().manual_seed(M + K + N)
    x = torch.randn(M, K, generator=generator) * torch.logspace(-2, 1, M)[:, None]
    values = torch.randint(-127, 128, (K, N), dtype=torch.int8, generator=generator)
    scale = (0.5 + torch.rand(N, generator=generator)) / (74 * K**0.5)
    return x.bfloat16(), values, scale.bfloat16(), torch.randn(N, generator=generator).bfloat16()


def assert_rounded_once(got: Tensor, exact: Tensor) -> None:
    """Half a step of bfloat16 is 2^-8 of a number at most; the rest is for fp32 on the way."""
    error = (got.double() - exact.double()).abs()
    assert (error <= exact.double().abs() * 2**-7.9 + 1e-5).all()


def fp32(layer: Layer, gelu: bool) -> Tensor:
    """The reference without its last rounding."""
    x, values, scale, bias = layer
    return integer_linear(x.float(), values, scale, bias, gelu)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("N", [16, 48, 3072])
@pytest.mark.parametrize("K", [4, 64, 768])
@pytest.mark.parametrize("M", [1, 5, 33])
def test_equals_an_exact_product_of_integers(linear, M, K, N, gelu):
    layer = operands(M, K, N)
    assert_rounded_once(linear(*layer, gelu), fp32(layer, gelu))


def test_a_long_sum_at_its_largest_stays_exact(linear):
    """All 65536 products at their limit, whose sum the shifted weights bring to the end of int32."""
    K = operators.MOST_INPUTS
    x, values = torch.ones(2, K, dtype=torch.bfloat16), torch.full((K, 16), 127, dtype=torch.int8)
    x[1], values[:, 1] = -1, -127
    one, zero = torch.ones(16, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.bfloat16)
    layer = (x, values, one, zero)
    assert_rounded_once(linear(*layer, False), fp32(layer, False))
    assert fp32(layer, False)[:, :2].tolist() == [[127.0 * K, -127.0 * K], [-127.0 * K, 127.0 * K]]


@pytest.mark.parametrize("gelu", [False, True])
def test_extreme_rows_and_weights(linear, gelu):
    x, values, scale, bias = operands(7, 64, 48)
    x[0], x[1] = 0.0, 1e-38  # nothing to quantise but the bias
    x[2] *= 1e30
    x[3, 5:] = 0.0
    x[4] = x[4].abs().max()  # all at the end of the range
    values[:, 3], values[::2, 4] = -128, 127
    layer = (x, values, scale, bias)
    got = linear(*layer, gelu)
    assert_rounded_once(got, fp32(layer, gelu))
    assert torch.equal(got[0], got[1])
    assert torch.equal(linear(*layer, False)[0], bias)


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_no_number_stays_visible_in_its_own_row_alone(linear, what):
    x, values, scale, bias = operands(4, 64, 32)
    clean = linear(x, values, scale, bias, False)
    x[2, 7] = what
    got = linear(x, values, scale, bias, False)
    assert not got[2].isfinite().any()
    assert torch.equal(got[[0, 1, 3]], clean[[0, 1, 3]])


def test_gelu_from_end_to_end(linear):
    """One weight of 1 lets the bias through: every magnitude, both signs."""
    bias = torch.cat([torch.logspace(-30, 30, 120), -torch.logspace(-30, 30, 120)]).bfloat16()
    x, values = torch.zeros(1, 4, dtype=torch.bfloat16), torch.ones(4, 240, dtype=torch.int8)
    got = linear(x, values, torch.ones_like(bias), bias, True).double()[0]
    exact = torch.nn.functional.gelu(bias.double(), approximate="tanh")
    assert ((got - exact).abs() <= exact.abs() * 2**-7.9 + 1e-6).all()


def test_same_bits_for_any_number_of_threads(linear):
    layer = operands(203, 768, 176)  # 3 blocks of rows, 3 strips of columns, the last narrow: threads share a strip
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(linear(*layer, True))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_row_does_not_see_which_others_there_are(linear):
    x, *rest = operands(100, 64, 80)
    together = linear(x, *rest, False)
    for i in (0, 5, 6, 95, 99):
        assert torch.equal(linear(x[i : i + 1], *rest, False)[0], together[i])


def test_reads_columns_of_a_wider_tensor_in_place(linear):
    x, *rest = operands(9, 64, 32)
    wide = torch.cat((x, torch.full_like(x, 1e9)), dim=1)
    assert torch.equal(linear(wide[:, :64], *rest, False), linear(x, *rest, False))


def test_no_rows_give_no_rows(linear):
    x, *rest = operands(2, 64, 32)
    assert linear(x[:0], *rest, False).shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, v, s, b: (x[:, :62].contiguous(), v[:62].contiguous(), s, b), "62 inputs and 32 outputs"),
        (lambda x, v, s, b: (x, v[:, :24].contiguous(), s[:24], b[:24]), "64 inputs and 24 outputs"),
        (lambda x, v, s, b: (x[None], v, s, b), r"x \[1, 3, 64\]"),
        (lambda x, v, s, b: (x[:, :32], v, s, b), r"x \[3, 32\], values \[64, 32\]"),
        (lambda x, v, s, b: (x.float(), v, s, b), "x in torch.float32"),
        (lambda x, v, s, b: (x, v.bfloat16(), s, b), "values in torch.bfloat16"),
        (lambda x, v, s, b: (x, v, s, b[:16]), r"bias \[16\], expected \[32\]"),
        (lambda x, v, s, b: (x, v.t().contiguous().t(), s, b), "values with strides"),
        (lambda x, v, s, b: (x.t().contiguous().t(), v, s, b), "x with strides"),
    ],
)
def test_refuses_what_the_kernel_cannot_take(linear, change, message):
    with pytest.raises(ValueError, match=message):
        linear(*change(*operands(3, 64, 32)), False)


def test_on_another_cpu_it_says_what_is_lacking(linear, monkeypatch):
    monkeypatch.setattr(operators, "cpu_lacks", lambda needed: needed[-1:])
    operators._function.cache_clear()
    with pytest.raises(BackendError, match=r"this CPU lacks avx512_vnni\nfix: build with --weights int8"):
        linear(*operands(1, 64, 16), False)
