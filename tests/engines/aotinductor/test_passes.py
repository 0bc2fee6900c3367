"""Passes over exported programs: how many places they find, and that the program computes what it did."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvar.engines.aotinductor.convolutions import use_row_statistics, use_small_enlargements
from fastvar.engines.aotinductor.graph import tidy
from fastvar.engines.aotinductor.operators import LINEAR_INT8, register
from fastvar.engines.aotinductor.passes import linear_weights, use_attention_kernel, use_onednn_linear
from fastvar.export.tracing.torch_export import fused_attention

Pass = Callable[[Any, Any], int]


class Module(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._function(*tensors)


def changed(function: Callable[..., Tensor], change: Pass, *tensors: Tensor) -> tuple[int, Any]:
    """How many places the pass found, and the program behind it."""
    with torch.no_grad():
        program = torch.export.export(Module(function), tensors)
    tidy(torch, program)
    return change(torch, program), program


def check(function: Callable[..., Tensor], change: Pass, *tensors: Tensor, places: int, tolerance: float) -> None:
    found, program = changed(function, change, *tensors)
    assert found == places
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*tensors), function(*tensors), atol=tolerance, rtol=tolerance)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.manual_seed(sum(shape))).to(dtype)


def test_weights_of_linear_layers_are_those_that_nothing_else_reads():
    def layers(x: Tensor, own: Tensor, b: Tensor, shown: Tensor, turned: Tensor, last: Tensor) -> Tensor:
        h = F.linear(F.linear(x, own, b), own, b) + F.linear(x, shown, b) + F.linear(x, turned.T, b)
        return F.linear(h, last, b) + shown.sum() + F.linear(own, last, b).sum()  # `own` is multiplied as rows, too

    square = [random(16, 16) for _ in range(4)]
    _, program = changed(layers, use_onednn_linear, random(5, 16), square[0], random(16), *square[1:])
    assert linear_weights(program) == (1,), "the last of the inputs"


def test_linear_layers_take_their_gelu_along():
    def layers(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = F.gelu(F.linear(x, w, b), approximate="tanh")
        return F.linear(h, w, b) + F.gelu(F.linear(x, w, b))  # the second GELU is the exact one, and stays

    operands = random(5, 16), random(16, 16), random(16)
    check(layers, use_onednn_linear, *operands, places=3, tolerance=1e-5)
    _, program = changed(layers, use_onednn_linear, *operands)
    assert sum("gelu" in str(node.target) for node in program.graph.nodes) == 1


def test_a_gelu_that_is_not_the_only_reader_stays():
    def layers(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = F.linear(x, w, b)
        return h + F.gelu(h, approximate="tanh")

    check(layers, use_onednn_linear, random(5, 16), random(16, 16), random(16), places=1, tolerance=1e-5)


def test_linear_layers_without_bias_stay():
    found, _ = changed(F.linear, use_onednn_linear, random(5, 16), random(16, 16))
    assert found == 0


@pytest.mark.parametrize(
    ("dtype", "types", "places"),
    [
        (torch.float32, ("float32",), 1),
        (torch.bfloat16, ("float32",), 0),
        (torch.bfloat16, ("float32", "bfloat16"), 1),
        (torch.float16, ("float32", "bfloat16"), 0),
    ],
)
def test_linear_layers_that_onednn_may_refuse_stay(dtype: torch.dtype, types: tuple[str, ...], places: int):
    operands = (random(*shape, dtype=dtype) for shape in ((5, 16), (16, 16), (16,)))
    with torch.no_grad():
        program = torch.export.export(Module(F.linear), tuple(operands))
    assert use_onednn_linear(torch, program, types) == places


@pytest.mark.parametrize(
    ("head_dim", "dtype", "places"), [(16, torch.bfloat16, 1), (12, torch.bfloat16, 0), (16, torch.float32, 0)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_goes_to_the_kernel_where_it_is_supported(head_dim, dtype, places, masked):
    q, keys = random(4, 6, head_dim, dtype=dtype), random(9, 6, head_dim, dtype=dtype)
    bias = [torch.zeros(6, 1, 9)] if masked else []

    def attn_mlp(q: Tensor, keys: Tensor, values: Tensor, *bias: Tensor) -> Tensor:
        return fused_attention(q, keys, values, bias[0] if bias else None, 3 * head_dim)

    found, program = changed(attn_mlp, use_attention_kernel, q, keys, keys, *bias)
    assert found == places
    read = [str(node.target) for node in program.graph.nodes if node.users]
    assert sum("fastvar.attention" in target for target in read) == places
    assert sum("transpose" in target for target in read) == (0 if places else 4), "nothing is turned and turned back"


@pytest.mark.parametrize("int8", [False, True])
def test_attention_scores_in_int8_where_layers_do(int8: bool):
    layer = register(LINEAR_INT8)
    values, scale = torch.ones(48, 16, dtype=torch.int8), torch.ones(16, dtype=torch.bfloat16)

    def attends(q: Tensor, keys: Tensor) -> Tensor:
        out = fused_attention(q, keys, keys, None, 48)
        return layer(out, values, scale, scale, False) if int8 else out

    found, program = changed(
        attends, use_attention_kernel, random(4, 3, 16, dtype=torch.bfloat16), random(9, 3, 16, dtype=torch.bfloat16)
    )
    assert found == 1
    (kernel,) = [n for n in program.graph.nodes if "fastvar.attention" in str(n.target)]
    assert kernel.args[-1] is int8


@pytest.mark.parametrize("channels", [16, 12])
def test_attention_over_channels_of_a_convolution(channels: int):
    """They lie apart: the kernel is given copies of them."""

    def attends(qkv: Tensor) -> Tensor:  # [B, 3C, h, w], as image tokenizers have it
        q, k, v = qkv.flatten(2).permute(2, 0, 1).split(channels, dim=-1)
        return fused_attention(q, k, v, None, channels)

    qkv = random(1, 3 * channels, 4, 5, dtype=torch.bfloat16)
    found, program = changed(attends, use_attention_kernel, qkv)
    assert found == (channels == 16)
    (kernel,) = [n for n in program.graph.nodes if "attention" in str(n.target)]
    if found:
        assert [operand.meta["val"].stride(-1) for operand in kernel.args[:3]] == [1, 1, 1]
        assert kernel.meta["val"].shape == (20, 1, channels)


def test_norms_by_rows():
    def norms(x: Tensor) -> Tensor:
        return F.group_norm(F.group_norm(x, 4, eps=1e-6), 32, eps=1e-6)

    check(norms, use_row_statistics, 3 + 2 * random(1, 32, 6, 10), places=2, tolerance=1e-5)


def test_norms_far_from_zero():
    """Variance is taken around the mean, not as a difference of large numbers."""
    x = 1000 + random(1, 8, 16, 16).double()
    expected = F.group_norm(x, 2, eps=1e-6)
    _, program = changed(lambda t: F.group_norm(t, 2, eps=1e-6), use_row_statistics, x.float())
    torch.testing.assert_close(program.module()(x.float()).double(), expected, atol=2e-3, rtol=2e-3)


def enlarge(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_enlargements_by_four_small_convolutions(size):
    operands = random(1, 6, *size), random(7, 6, 3, 3), random(7)
    check(enlarge, use_small_enlargements, *operands, places=1, tolerance=1e-5)


def test_other_enlargements_stay():
    def other(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        large = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return F.conv2d(large, weight, bias, padding=1) + F.conv2d(large, weight, bias, padding=1).square()

    found, _ = changed(other, use_small_enlargements, random(1, 6, 3, 5), random(7, 6, 3, 3), random(7))
    assert found == 0
