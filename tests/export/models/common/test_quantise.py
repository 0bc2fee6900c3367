import functools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import Tensor

from fastvar.core.precision import Precision
from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend
from fastvar.engines.registry import get_backend
from fastvar.errors import InternalError
from fastvar.export.models.common.quantise import LARGEST, SCALE, dequantise, quantise, quantise_graph, quantise_sources
from fastvar.export.models.common.step_graph import WeightShape
from fastvar.export.models.common.weights import Role
from fastvar.export.models.infinity.blocks import AttnMlp, Qkv
from fastvar.export.models.infinity.steps import TextKV
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.tracing.onnx import TracedGraph, trace
from tests.models import tiny_models as tiny
from tests.models.small_bundle import graph, tensor

LAYER = "transformer.blocks.0."
INT8, FP8 = Precision("float32", "int8"), Precision("float32", "float8_e4m3fn")
STORED = [Precision(compute, weights) for compute in ("float32", "bfloat16") for weights in ("int8", "float8_e4m3fn")]


@st.composite
def matrices(draw) -> Tensor:
    """[outputs, inputs], each channel of its own magnitude, some empty, some with a single large weight."""
    outputs, inputs = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    matrix = torch.randn(outputs, inputs, generator=torch.manual_seed(draw(st.integers(0, 2**31))))
    for channel in matrix:
        channel *= draw(st.sampled_from([0.0, 1e-5, 0.02, 1.0, 300.0]))
        channel[0] *= draw(st.sampled_from([1.0, 50.0]))
    return matrix


def restored(values: Tensor, scale: Tensor) -> Tensor:
    """What the stored numbers stand for, without the compute precision's own rounding."""
    return (values.double() * scale.double()).t()


@settings(max_examples=200, deadline=None)
@given(matrices(), st.sampled_from(["float32", "bfloat16"]))
def test_int8_is_off_by_half_a_step_at_most(matrix: Tensor, compute: str):
    """A step of the scale as it is stored: the largest weight does not clip by its rounding to bfloat16."""
    values, scale = quantise(matrix, Precision(compute, "int8"))
    error = (restored(values, scale) - matrix).abs()
    assert (error <= scale.double()[:, None] * (0.5 + 1e-5)).all()


@settings(max_examples=200, deadline=None)
@given(matrices(), st.sampled_from(["float32", "bfloat16"]))
def test_fp8_is_off_by_a_sixteenth_of_the_weight_or_half_its_smallest_step(matrix: Tensor, compute: str):
    values, scale = quantise(matrix, Precision(compute, "float8_e4m3fn"))
    assert values.float().isfinite().all()
    error = (restored(values, scale) - matrix).abs()
    smallest = 2.0**-9 * scale.double()[:, None]
    assert (error <= torch.maximum(matrix.abs() / 16, smallest / 2) * (1 + 1e-5)).all()


@settings(max_examples=100, deadline=None)
@given(matrices(), st.sampled_from(STORED))
def test_every_channel_has_a_scale_of_its_own(matrix: Tensor, precision: Precision):
    """So that its largest weight takes the largest number, whatever the other channels are."""
    values, scale = quantise(matrix, precision)
    assert (values.shape, scale.shape) == (tuple(reversed(matrix.shape)), matrix.shape[:1])
    assert (scale > 0).all()
    full = values.float().abs().amax(dim=0)
    assert (full[matrix.any(dim=1)] >= 0.99 * LARGEST[precision.weights]).all()


@pytest.mark.parametrize("precision", STORED, ids=lambda p: p.label)
def test_an_empty_channel_stays_empty(precision: Precision):
    matrix = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]])
    values, scale = quantise(matrix, precision)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert dequantise(values, scale)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("precision", STORED, ids=lambda p: p.label)
def test_values_scales_and_product_have_their_types(precision: Precision):
    values, scale = quantise(torch.randn(4, 3), precision)
    compute = getattr(torch, precision.compute)
    assert (values.dtype, scale.dtype) == (getattr(torch, precision.weights), compute)
    assert values.is_contiguous()
    torch.testing.assert_close(dequantise(values, scale), restored(values, scale).to(compute))


@pytest.mark.parametrize("precision", STORED, ids=lambda p: p.label)
def test_exactly_the_matrices_are_stored_quantised(precision: Precision):
    sources = transformer_weights(tiny.CONFIG, tiny.model().state_dict())
    matrices = {name for name, source in sources.items() if source.role is Role.QUANTIZABLE}
    assert {name.split(".")[-2] for name in matrices} == {"qkv", "proj", "mat_q", "mat_kv", "fc1", "fc2"}
    assert "transformer.head.weight" not in matrices
    stored = quantise_sources(sources, precision)
    assert stored.keys() == sources.keys() | {name + SCALE for name in matrices}
    for name, source in sources.items():
        if name not in matrices:
            assert stored[name] is source
            continue
        values, scale = stored[name], stored[name + SCALE]
        assert (values.shape, scale.shape) == (source.shape[::-1], source.shape[:1])
        expected = quantise(source.fetch(), precision)
        assert torch.equal(values.fetch().view(torch.int8), expected[0].view(torch.int8))
        assert torch.equal(scale.fetch(), expected[1])


def test_a_precision_without_a_weight_format_stores_everything_as_it_is():
    sources = transformer_weights(tiny.CONFIG, tiny.model().state_dict())
    assert quantise_sources(sources, Precision("bfloat16")) == sources


STEPS = {
    "qkv": lambda: Qkv(tiny.CONFIG, rows=2, size=(4, 5), kept=12, rope_grid=(64, 64)),
    "attn_mlp": lambda: AttnMlp(
        tiny.CONFIG, rows=2, size=(4, 5), kept=12, past=8, text_length=8, cached_size=(2, 2), fills=True
    ),
    "text-kv": lambda: TextKV(tiny.CONFIG, rows=2, text_length=8),
}


@functools.cache
def traced(step: str, precision: Precision) -> TracedGraph:
    return trace(STEPS[step](), weight_shapes(step), precision)


def layer(step: str) -> dict[str, Tensor]:
    """The weights of layer 0 that a step takes."""
    sources = transformer_weights(tiny.CONFIG, tiny.model().state_dict())
    return {name: sources[LAYER + name].fetch() for name in STEPS[step]().weights}


def weight_shapes(step: str) -> dict[str, WeightShape]:
    sources = transformer_weights(tiny.CONFIG, {})
    found = {name: sources[LAYER + name] for name in STEPS[step]().weights}
    return {name: WeightShape(source.shape, source.role) for name, source in found.items()}


def matrices_of(step: str) -> list[str]:
    return [name for name, weight in weight_shapes(step).items() if weight.role is Role.QUANTIZABLE]


def activations(step: str) -> dict[str, np.ndarray]:
    shapes, rng = STEPS[step]().input_shapes(), np.random.default_rng(0)
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    if "kept" in made:
        made["kept"] = rng.permutation(20)[: len(made["kept"]) // 2].repeat(2) * 2 + np.tile([0, 1], 12)
    return made


def run(model: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    backend = OnnxRuntimeBackend()
    return backend._session(backend.build(model).engine).run(None, feeds)


@pytest.mark.parametrize("step", STEPS)
def test_a_quantised_graph_computes_with_the_matrices_that_its_weights_stand_for(step: str):
    weights, inputs = layer(step), activations(step)
    stored, meant = dict(weights), dict(weights)
    for name in matrices_of(step):
        stored[name], stored[name + SCALE] = quantise(weights[name], INT8)
        meant[name] = dequantise(stored[name], stored[name + SCALE])
    found = run(traced(step, INT8).graph, {**inputs, **{name: w.numpy() for name, w in stored.items()}})
    expected = run(traced(step, Precision()).graph, {**inputs, **{name: w.numpy() for name, w in meant.items()}})
    exact = run(traced(step, Precision()).graph, {**inputs, **{name: w.numpy() for name, w in weights.items()}})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert np.abs(found[0] - exact[0]).max() > 1e-3


@pytest.mark.parametrize("precision", [INT8, FP8, Precision("bfloat16", "int8")], ids=lambda p: p.label)
@pytest.mark.parametrize("step", STEPS)
def test_scales_go_in_behind_their_matrix_and_nothing_else_changes(step: str, precision: Precision):
    plain, quantised = traced(step, Precision(precision.compute)), traced(step, precision)
    expected = []
    for spec in plain.inputs:
        if spec.name not in matrices_of(step):
            expected.append((spec.name, spec.dtype, spec.shape))
            continue
        outputs, inputs = spec.shape
        expected.append((spec.name, precision.weights, (inputs, outputs)))
        expected.append((spec.name + SCALE, precision.compute, (outputs,)))
    assert [(spec.name, spec.dtype, spec.shape) for spec in quantised.inputs] == expected
    assert quantised.outputs == plain.outputs
    onnx.checker.check_model(onnx.load_model_from_string(quantised.graph), full_check=True)


def product(op: str, factors: list[str], **attributes: int) -> onnx.ModelProto:
    node = helper.make_node(op, factors, ["y"], **attributes)
    square = [tensor("x", [4, 4]), tensor("w", [4, 4]), tensor("b", [4])]
    return onnx.load_model_from_string(graph([node], square, [tensor("y", [4, 4])]))


@pytest.mark.parametrize(
    "model",
    [
        product("MatMul", ["x", "w"]),
        product("Gemm", ["x", "w", "b"]),
        product("Gemm", ["x", "w", "b"], transB=0),
        product("Gemm", ["w", "x", "b"], transB=1),
        product("Gemm", ["x", "x", "w"], transB=1),
    ],
    ids=["no-gemm", "not-transposed", "transposed-not", "first-factor", "addend"],
)
def test_a_weight_that_is_not_the_transposed_factor_of_a_gemm_is_a_bug(model: onnx.ModelProto):
    with pytest.raises(InternalError, match=r"weight 'w' is not the transposed factor of a Gemm"):
        quantise_graph(model, ["w"], INT8)


def test_only_the_named_weights_are_quantised():
    changed = quantise_graph(product("Gemm", ["x", "w", "b"], transB=1), ["w"], INT8)
    assert [value.name for value in changed.graph.input] == ["x", "w", "w.scale", "b"]
    assert [node.op_type for node in changed.graph.node] == ["DequantizeLinear", "Gemm"]
    same = quantise_graph(product("MatMul", ["x", "w"]), [], INT8)
    assert [value.name for value in same.graph.input] == ["x", "w", "b"]


@pytest.mark.parametrize(
    ("weights", "target"), [("int8", "sm86"), ("float8_e4m3fn", "sm89")], ids=["int8-sm86", "fp8-sm89"]
)
def test_a_quantised_block_builds_with_its_attentions_fused(weights: str, target: str):
    pytest.importorskip("tensorrt_rtx")
    backend = get_backend("tensorrt-rtx")
    precision = Precision("bfloat16", weights)
    report = backend.build(traced("attn_mlp", precision).graph, backend.resolve_target(target, precision)).report
    assert report.fused_attentions == 2


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
@pytest.mark.parametrize("weights", ["int8", "float8_e4m3fn"])
def test_channels_of_tiny_weights_do_not_vanish(compute: str, weights: str):
    """Their scales are at the end of fp16's range."""
    matrix = torch.linspace(-1, 1, 64).repeat(3, 1) * torch.tensor([[1e-3], [1e-5], [3e-6]])
    found = dequantise(*quantise(matrix, Precision(compute, weights))).float()
    error = (found - matrix).norm(dim=1) / matrix.norm(dim=1)
    assert (error < 0.06).all(), error


def test_a_weight_that_is_not_a_number_stays_one_in_its_scale():
    matrix = torch.ones(2, 4)
    matrix[1, 2] = float("nan")
    _, scale = quantise(matrix, Precision("float32", "int8"))
    assert torch.isnan(scale).tolist() == [False, True]
