"""Where a build computes in 16 bits, and where it must not."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from fastvar.core.precision import Precision
from fastvar.engines.registry import get_backend
from fastvar.export.checkpoints.checkpoint import image_tokenizer_shapes
from fastvar.export.checkpoints.random_weights import RandomWeights, text_encoder_shapes
from fastvar.export.models.common import rows
from fastvar.export.models.common.coders import TextEncoder, image_tokenizer_role, text_encoder_role
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.models.common.weights import Role, WeightSource, plain_weights
from fastvar.export.models.infinity.blocks import AttnMlp, Qkv
from fastvar.export.models.infinity.steps import Conditioning, InfinityImageDecoder, SamplingHead, TextKV
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.models.registry import ADAPTERS
from fastvar.export.tracing.onnx import TracedGraph, layer_weights, trace
from fastvar.families.infinity import ImageTokenizerConfig
from tests.models import tiny_models as tiny

CONFIG = tiny.CONFIG
SIZE, CACHED = (4, 5), (2, 2)
TOKENS, KEPT = 20, 12
HALF = ["bfloat16", "float16"]
LAYER, SHARED = "transformer.blocks.{layer}.", "transformer."
BLOCK = {"config": CONFIG, "rows": 2, "size": SIZE}
TEXT = {"config": CONFIG, "rows": 2, "text_length": 8}
ATTEND = {**BLOCK, "past": 8, "text_length": 8, "cached_size": CACHED, "fills": True}
GRAPHS = {
    "qkv": StepGraph("qkv", Qkv, {**BLOCK, "kept": KEPT, "rope_grid": (64, 64)}, LAYER),
    "qkv-dense": StepGraph("qkv", Qkv, {**BLOCK, "kept": TOKENS, "rope_grid": (64, 64)}, LAYER),
    "attn_mlp": StepGraph("attn_mlp", AttnMlp, {**ATTEND, "kept": KEPT}, LAYER),
    "attn_mlp-dense": StepGraph("attn_mlp", AttnMlp, {**ATTEND, "kept": TOKENS}, LAYER),
    "text-kv": StepGraph("text-kv", TextKV, TEXT, LAYER),
    "conditioning": StepGraph("conditioning", Conditioning, TEXT, SHARED),
    "sampling_head": StepGraph(
        "sampling_head", SamplingHead, {**BLOCK, "final": (12, 16), "next_size": (5, 6), "next_index": 4}, SHARED
    ),
}
# Borders in the compute precision, and those of whole numbers; every other one is fp32.
COMPUTED = {
    "qkv": {"q", "keys", "values"},
    "attn_mlp": {"q", "keys", "values", "text_keys", "text_values", "cached_sa", "cached_ca", "cached_ffn"}
    | {"cache_sa", "cache_ca", "cache_ffn"},
    "text-kv": {"text", "text_keys", "text_values"},
    "conditioning": {"text"},
    "sampling_head": set(),
}
SENSITIVE = {"Softmax", "LayerNormalization", "ReduceMean", "ReduceSum", "TopK"}
INTEGERS = {"kept", "kept_ca", "kept_ffn"}


@functools.cache
def sources() -> dict[str, WeightSource]:
    return transformer_weights(CONFIG, tiny.model().state_dict())


@functools.cache
def traced(name: str, compute: str) -> TracedGraph:
    graph = GRAPHS[name]
    module = graph.factory(**graph.arguments)
    return trace(module, layer_weights(sources(), graph.weight_binding(module)), Precision(compute))


def weights(name: str, compute: str) -> dict[str, Tensor]:
    """The weights of layer 0, each in the type that its role asks for."""
    graph = GRAPHS[name]
    binding = graph.weight_binding(graph.factory(**graph.arguments))
    found = {weight: sources()[pattern.format(layer=0)] for weight, pattern in binding.items()}
    return {weight: s.fetch().to(getattr(torch, s.role.dtype(Precision(compute)))) for weight, s in found.items()}


def inputs(name: str, offset: float = 0.0) -> dict[str, Tensor]:
    """Activations in fp32; those of the residual stream lie around `offset`."""
    graph, random = GRAPHS[name], torch.manual_seed(0)
    made = {n: torch.randn(s, generator=random) for n, s in graph.factory(**graph.arguments).input_shapes().items()}
    made |= {n: torch.rand(made[n].shape, generator=random) for n in ("noise",) if n in made}
    fixed = {"mask": tiny.text()[1].float(), "tau": [0.7], "cut": [0.1], "guidance": [2.0]}
    made |= {n: torch.as_tensor(value) for n, value in fixed.items() if n in made}
    if "text_bias" in made:
        made["text_bias"] = (torch.arange(8) < 5).float().sub(1).mul(1e30).expand_as(made["text_bias"])
    if "x" in made:
        made["x"] += offset
    return made


def run(
    name: str, compute: str, tensors: dict[str, Tensor], filled: Mapping[str, float] = MappingProxyType({})
) -> dict[str, Tensor]:
    """The step in eager torch, its activations cast as a graph of that precision takes them.

    Weights in `filled` hold one number throughout.
    """
    graph = GRAPHS[name]
    module = graph.factory(**graph.arguments)
    cast = [t.to(getattr(torch, compute)) if n in COMPUTED.get(graph.name, ()) else t for n, t in tensors.items()]
    bound = weights(name, compute)
    bound |= {n: torch.full_like(bound[n], value) for n, value in filled.items()}
    return dict(zip(module.outputs, module(*cast, weights=bound), strict=True))


def distance(found: Tensor, expected: Tensor) -> float:
    """Of two tensors, relative to the second."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("compute", HALF)
@pytest.mark.parametrize("name", COMPUTED)
def test_activations_at_the_border_of_a_graph(name: str, compute: str):
    graph = traced(name, compute)
    module = GRAPHS[name].factory(**GRAPHS[name].arguments)
    activations = [s for s in (*graph.inputs, *graph.outputs) if s.name not in module.weights]
    assert [s.name for s in activations] == [*module.input_shapes(), *module.outputs]
    found = {s.name: s.dtype for s in activations}
    assert found == {n: _border(name, n, compute) for n in found}


def _border(graph: str, name: str, compute: str) -> str:
    if name in INTEGERS:
        return "int64"
    return compute if name in COMPUTED[graph] else "float32"


@pytest.mark.parametrize("compute", HALF)
@pytest.mark.parametrize("name", COMPUTED)
def test_norms_gates_and_embeddings_stay_fp32_and_operands_do_not(name: str, compute: str):
    bound = weights(name, compute)
    found = {s.name: s.dtype for s in traced(name, compute).inputs if s.name in bound}
    exact = {n for n, s in sources().items() if s.role is Role.FP32}
    prefix = GRAPHS[name].prefix.format(layer=0)
    assert found == {n: "float32" if prefix + n in exact else compute for n in bound}
    assert {"transformer.lvl_embed.weight", "transformer.blocks.0.ca_norm.weight"} < exact
    assert {"transformer.blocks.0.ada_gss", "transformer.blocks.0.sa.q_scale"} < exact


@pytest.mark.parametrize("name", COMPUTED)
def test_a_step_in_16_bits_builds_for_a_gpu(name: str):
    pytest.importorskip("tensorrt_rtx")
    backend = get_backend("tensorrt-rtx")
    for compute in HALF:
        report = backend.build(traced(name, compute).graph, "sm86").report
        assert report.kernels > 0
        assert report.fused_attentions == getattr(GRAPHS[name].factory, "attentions", 0)


@pytest.mark.parametrize(("compute", "tolerance"), [("bfloat16", 0.01), ("float16", 0.002)])
@pytest.mark.parametrize("name", ["qkv-dense", "attn_mlp-dense", "text-kv", "conditioning", "sampling_head"])
def test_a_step_in_16_bits_stays_close_to_fp32(name: str, compute: str, tolerance: float):
    tensors = inputs(name)
    expected, found = run(name, "float32", tensors), run(name, compute, tensors)
    for output, value in expected.items():
        assert distance(found[output], value) < tolerance, output
    assert any(not torch.equal(found[output].float(), value) for output, value in expected.items())


@pytest.mark.parametrize(("compute", "tolerance"), [("bfloat16", 0.01), ("float16", 0.002)])
def test_the_residual_stream_keeps_fp32(compute: str, tolerance: float):
    """Around 512, 16 bits hold no step below 4 (bfloat16) or a half: what a block adds would drown."""
    tensors = inputs("attn_mlp-dense", offset=512)
    expected, found = (run("attn_mlp-dense", c, tensors)["x_out"] - tensors["x"] for c in ("float32", compute))
    assert distance(found, expected) < tolerance


def test_queries_and_keys_are_normalised_in_fp32():
    """In fp16 the squares of sixteen numbers around 300 overflow, and every query and key would be zero."""
    tensors, large = inputs("qkv-dense"), {"sa.qkv.bias": 300.0}
    found, expected = (run("qkv-dense", compute, tensors, large) for compute in ("float16", "float32"))
    assert distance(found["q"], expected["q"]) < 0.002
    assert distance(found["keys"], expected["keys"]) < 0.002


@pytest.mark.parametrize("compute", HALF)
def test_selection_is_that_of_fp32(compute: str):
    tensors = inputs("qkv", offset=512)
    expected = run("qkv", "float32", tensors)["kept"]
    assert torch.equal(run("qkv", compute, tensors)["kept"], expected)
    rounded = rows.select(tensors["x"].to(getattr(torch, compute)).float(), 2, KEPT)
    assert not torch.equal(rows.rows_of(rounded, 2), expected)


@pytest.mark.parametrize("compute", HALF)
def test_selection_inside_the_second_half_is_that_of_fp32(compute: str):
    """With self- and cross-attention silent, the stream is the same in every precision; rounded, it would not be."""
    tensors = inputs("attn_mlp", offset=512)
    tensors["kept"] = run("qkv", "float32", {n: tensors[n] for n in ("x", "modulation")})["kept"]
    tensors |= {n: torch.zeros_like(tensors[n]) for n in ("cached_sa", "cached_ca")}
    silent = dict.fromkeys(("sa.proj.weight", "sa.proj.bias", "ca.proj.weight", "ca.proj.bias"), 0.0)
    found = run("attn_mlp", compute, tensors, silent)
    assert torch.equal(found["kept_ca"], tensors["kept"])
    assert torch.equal(found["kept_ffn"], tensors["kept"])


def test_restoring_from_a_16_bit_cache_averages_in_fp32():
    """Multiples of 1/64 below 2: bfloat16 holds each, fp32 their sum, bfloat16 most sums not."""
    whole = torch.randint(-127, 128, (24, 3), generator=torch.manual_seed(0))
    cached = (whole / 64).bfloat16()
    corners = rows.area_corners((3, 4), (4, 5), 2, 2)  # [4, 40]
    kept = torch.tensor([4, 5])
    fresh = torch.full((2, 3), 7.25)
    found = rows.restore(fresh, kept, cached, corners)
    assert found.dtype == torch.float32
    exact = whole[corners].sum(dim=0) / 256  # [40, 3]
    assert torch.equal(found[kept], fresh)
    others = torch.ones(40, dtype=torch.bool).index_fill(0, kept, False)
    assert torch.equal(found[others], exact[others])
    assert not torch.equal(exact[others].bfloat16().float(), exact[others])


@pytest.mark.parametrize("count", [5, 6, 13, 20])
def test_selection_in_turns_is_that_of_one_topk(monkeypatch: pytest.MonkeyPatch, count: int):
    monkeypatch.setattr(rows, "LONGEST_TOPK", 5)
    score = torch.stack([torch.randperm(20, generator=torch.manual_seed(s)) for s in (0, 1)], dim=1) / 4
    with rows.topk_operator():
        _, index = rows.largest(score, count, 0, -1.0)
    assert torch.equal(index, torch.topk(score, count, dim=0).indices)


def test_selection_in_turns_repeats_no_token_where_scores_tie(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "LONGEST_TOPK", 3)
    with rows.topk_operator():
        _, found = rows.largest(torch.zeros(10, 2), 10, 0, -1.0)
    assert found.sort(dim=0).values.tolist() == [[i, i] for i in range(10)]


def test_a_selection_longer_than_the_compilers_limit_builds():
    pytest.importorskip("tensorrt_rtx")
    long = Qkv(CONFIG, rows=1, size=(63, 64), kept=rows.LONGEST_TOPK + 1, rope_grid=(64, 64))
    binding = StepGraph("long", Qkv, {}, LAYER).weight_binding(long)
    graph = trace(long, layer_weights(sources(), binding), Precision("bfloat16")).graph
    assert sum(node.op_type == "TopK" for node in onnx.load_model_from_string(graph).graph.node) == 2
    assert get_backend("tensorrt-rtx").build(graph, "sm86").report.kernels > 0


IMAGES = ImageTokenizerConfig(bits=8, base_channels=24, channel_multipliers=(1, 1), residual_blocks=1)


def decoder(compute: str) -> TracedGraph:
    shapes = {n: s for n, s in image_tokenizer_shapes(IMAGES, ADAPTERS["infinity"]).items() if n.startswith("decoder.")}
    found = plain_weights("image_tokenizer", shapes, {}, image_tokenizer_role)
    graph = StepGraph("decoder", InfinityImageDecoder, {}, "image_tokenizer.decoder.")
    module = InfinityImageDecoder(IMAGES, (4, 4))
    return trace(module, layer_weights(found, graph.weight_binding(module)), Precision(compute))


def encoder_config() -> Any:
    from transformers import T5Config

    sizes = {"vocab_size": 40, "d_model": 128, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return T5Config(**sizes, feed_forward_proj="gated-gelu")


def encoder_sources(compute: str) -> dict[str, WeightSource]:
    """Those of the text encoder, by the names of its graph."""
    shapes = text_encoder_shapes(encoder_config())
    found = plain_weights("", shapes, RandomWeights(shapes), text_encoder_role(Precision(compute)))
    return {name.removeprefix("."): source for name, source in found.items()}


@functools.cache
def text_encoder(compute: str) -> TracedGraph:
    module = TextEncoder(encoder_config(), 16)
    binding = {name: name for name in module.weights}
    return trace(module, layer_weights(encoder_sources(compute), binding), Precision(compute))


def types(graph: TracedGraph) -> dict[str, str]:
    return {spec.name: spec.dtype for spec in (*graph.inputs, *graph.outputs)}


@pytest.mark.parametrize("compute", HALF)
def test_the_image_decoder_ends_in_fp32_and_builds(compute: str):
    pytest.importorskip("tensorrt_rtx")
    graph = decoder(compute)
    found = types(graph)
    assert (found["summed"], found["image"]) == ("float32", "float32")
    assert (found["conv_in.conv.weight"], found["conv_out.conv.weight"]) == (compute, "float32")
    assert {dtype for name, dtype in found.items() if ".norm" in name} == {"float32"}
    assert get_backend("tensorrt-rtx").build(graph.graph, "sm86").report.kernels > 0


@pytest.mark.parametrize("compute", HALF)
def test_the_text_encoder_gives_fp32_features_and_builds(compute: str):
    """In fp16 its `wo` would overflow and stays fp32."""
    pytest.importorskip("tensorrt_rtx")
    graph = text_encoder(compute)
    found = types(graph)
    assert (found["ids"], found["attention_mask"], found["features"]) == ("int64", "int64", "float32")
    assert found["encoder.final_layer_norm.weight"] == "float32"
    feed_forward = "encoder.block.0.layer.1.DenseReluDense."
    assert found[feed_forward + "wi_0.weight"] == compute
    assert found[feed_forward + "wo.weight"] == ("float32" if compute == "float16" else compute)
    assert get_backend("tensorrt-rtx").build(graph.graph, "sm86").report.kernels > 0


@pytest.mark.parametrize(("compute", "tolerance"), [("bfloat16", 0.02), ("float16", 0.003)])
def test_the_text_encoder_in_16_bits_stays_close_to_fp32_and_keeps_an_fp32_stream(compute: str, tolerance: float):
    module, streams = TextEncoder(encoder_config(), 16), []
    module.model.encoder.block[0].register_forward_hook(lambda _, __, out: streams.append(out[0].dtype))
    ids, mask = torch.arange(16)[None] * 2, (torch.arange(16) < 12).long()[None]
    features = []
    for kind in ("float32", compute):
        found = encoder_sources(kind)
        bound = {n: found[n].fetch().to(getattr(torch, found[n].role.dtype(Precision(kind)))) for n in module.weights}
        features.append(module(ids, mask, weights=bound)[:12])
    assert distance(features[1], features[0]) < tolerance
    assert not torch.equal(*features)
    assert streams == [torch.float32, torch.float32]


@pytest.mark.parametrize("compute", HALF)
def test_softmax_norms_and_selection_in_a_graph_take_fp32(compute: str):
    for graph, softmaxes in (
        (traced("attn_mlp", compute), 2),
        (traced("conditioning", compute), 1),
        (text_encoder(compute), 1),
    ):
        model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(graph.graph), strict_mode=True)
        types_of = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.value_info)}
        taken = [(n.op_type, types_of[n.input[0]]) for n in model.graph.node if n.op_type in SENSITIVE]
        assert sum(op == "Softmax" for op, _ in taken) == softmaxes
        assert {kind for _, kind in taken} == {onnx.TensorProto.FLOAT}
