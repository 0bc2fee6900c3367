"""Matrices in oneDNN's own order: the same results, one copy for all who hold it, and none behind them."""

import gc

import pytest
import torch
from torch import Tensor

from fastvar.core.tensors import TensorRef
from fastvar.engines.aotinductor.packed_weights import PackedWeights, _of_all, packed_bytes
from fastvar.engines.spec import EngineSpec, TensorSpec


def ref(matrix: Tensor) -> TensorRef:
    return TensorRef(matrix.data_ptr(), str(matrix.dtype).removeprefix("torch."), tuple(matrix.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 31, 200])
@pytest.mark.parametrize("gelu", [False, True])
def test_products_are_the_same_bits(dtype: torch.dtype, rows: int, gelu: bool):
    generator = torch.manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, 48), (80, 48), (80,)))
    linear, how = torch.ops.mkldnn._linear_pointwise, ("gelu", [], "tanh") if gelu else ("none", [], "")
    found, plain = linear(x, PackedWeights(torch).of(ref(weight), weight), bias, *how), linear(x, weight, bias, *how)
    single = rows == 1 and dtype == torch.float32  # is summed in another order
    torch.testing.assert_close(found, plain, atol=1e-5 if single else 0, rtol=0)


def test_a_matrix_is_packed_once_for_as_long_as_it_is_held():
    matrix = torch.randn(16, 32)
    session, beside = PackedWeights(torch), PackedWeights(torch)
    gc.collect()
    before = len(_of_all)
    first = session.of(ref(matrix), matrix)
    assert session.of(ref(matrix), matrix) is beside.of(ref(matrix), matrix) is first
    other = session.of(ref(matrix.view(32, 16)), matrix.view(32, 16))
    assert other is not first
    assert len(_of_all) == before + 2
    del first, other
    assert len(_of_all) == before


def test_another_sessions_is_not_taken_where_other_weights_lie_by_now():
    matrix = torch.randn(16, 32)
    old = PackedWeights(torch).of(ref(matrix), matrix)
    matrix[3, 5] += 1
    new = PackedWeights(torch).of(ref(matrix), matrix)
    assert not torch.equal(old.to_dense(), matrix)
    assert torch.equal(new.to_dense(), matrix)
    assert PackedWeights(torch).of(ref(matrix), matrix) is new


def engine(name: str, tensors: dict[str, tuple[int, ...]], weights: dict[str, str], dtype: str) -> EngineSpec:
    inputs = tuple(TensorSpec(n, dtype, shape) for n, shape in tensors.items())
    return EngineSpec(name, "", "", 0, inputs, (), weights, "", "", "")


def test_counts_what_the_layers_have_in_the_computed_type():
    layer = {"q": (2, 6, 4, 8), "proj": (8, 8), "bias": (8,), "table": (3, 8)}
    named = {"proj": "blocks.{layer}.proj", "bias": "blocks.{layer}.bias", "table": "table"}
    engines = (
        engine("first", layer, named, "bfloat16"),
        engine("the same at another scale", layer, named, "bfloat16"),
        engine("head", {"x": (2, 8), "weight": (8, 8)}, {"weight": "head"}, "bfloat16"),
        engine("int8", layer | {"q": (1,)}, {n: f"int8.{w}" for n, w in named.items()}, "int8"),
    )
    assert packed_bytes(engines, "bfloat16", layers=5) == 2 * (5 * 8 * 8 + 3 * 8)
    assert packed_bytes(engines, "float32", layers=5) == 0
