"""Attention and restoration of the exported step graphs, against the graphs as they were."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir
import pytest

from fastvar.engines.onnx_graph import clean_graph
from fastvar.engines.onnxruntime import attention as onnx_attention
from fastvar.engines.onnxruntime import restoration as onnx_restoration
from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend
from fastvar.engines.onnxruntime.editor import apply
from fastvar.engines.onnxruntime.rewriting import rewritten
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.models.infinity.blocks import AttnMlp
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.tracing.onnx import layer_weights, trace
from fastvar.families.infinity import TransformerConfig
from tests.engines.onnxruntime.test_convolutions import numbers, operators, run
from tests.models.small_bundle import linear

CONFIG = TransformerConfig(
    depth=1, width=64, heads=2, mlp_width=128, text_width=128, text_length=8, code_channels=8, chunks=1
)
SIZE, CACHED, PAST = (6, 5), (4, 3), 20
TOKENS = {"text_length": 8, "size": SIZE, "past": PAST}
STEPS = {
    "pruned": {"rows": 2, "kept": 13, "cached_size": CACHED, "fills": False},
    "dense": {"rows": 2, "kept": 30, "cached_size": None, "fills": True},
    "unguided": {"rows": 1, "text_rows": 2, "kept": 13, "cached_size": CACHED, "cached_rows": 2, "fills": False}
    | {"guided_past": 12},
}


@pytest.fixture(scope="module")
def attend_graphs() -> dict[str, bytes]:
    return {name: traced(**TOKENS, **step) for name, step in STEPS.items()}


def traced(**arguments: object) -> bytes:
    graph = StepGraph("step", AttnMlp, {"config": CONFIG, **arguments}, "transformer.blocks.{layer}.")
    module = graph.factory(**graph.arguments)
    return clean_graph(
        trace(module, layer_weights(transformer_weights(CONFIG, {}), graph.weight_binding(module))).graph
    )


def given_to(model: bytes, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random inputs, the text of every guidance row so long, and distinct tokens kept in each row."""
    given = numbers(model)
    rows, heads = len(lengths), CONFIG.heads
    bias = np.where(np.arange(8) < np.array(lengths)[:, None], np.float32(0), np.float32(-1e30))
    given["text_bias"] = np.repeat(bias, heads, axis=0)[:, None]
    own = given["q"].shape[1] // heads
    rng = np.random.default_rng(1)
    if "kept" in given:
        token = np.stack([rng.permutation(30)[:13] for _ in range(own)], axis=1)
        given["kept"] = (token * own + np.arange(own)).reshape(-1)
    assert given["text_bias"].shape[0] == rows * heads
    return given


@pytest.mark.parametrize("lengths", [(3, 3), (2, 5), (8, 1)], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written-out"])
@pytest.mark.parametrize("step", STEPS)
def test_attend_gives_the_same(
    attend_graphs: dict[str, bytes], step: str, fused: bool, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fastvar.engines.onnxruntime.attention.FUSED_BYTES", 0 if fused else 1 << 40)
    model = attend_graphs[step]
    changed, given = rewritten(model), given_to(model, lengths)
    assert operators(changed)["MultiHeadAttention"] == fused
    for before, after in zip(run(model, given), run(changed, given), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", STEPS)
def test_every_attention_and_every_restoration_is_found(
    attend_graphs: dict[str, bytes], step: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onnx_attention, "FUSED_BYTES", 0)
    model = onnx_ir.from_proto(onnx.load_from_string(attend_graphs[step]))
    assert apply(onnx_attention.RULES, model) == AttnMlp.attentions
    assert apply(onnx_restoration.RULES, model) == (0 if step == "dense" else 3)


def test_restored_maps_are_not_written_by_a_mask(attend_graphs: dict[str, bytes]):
    found = operators(rewritten(attend_graphs["pruned"]))
    assert found["GreaterOrEqual"] == 0
    assert found["ScatterND"] == 3


def test_keys_of_padding_are_not_read(attend_graphs: dict[str, bytes]):
    """What is no number would spread, if a weight of zero were multiplied by it."""
    model = rewritten(attend_graphs["pruned"])
    given = given_to(model, (3, 4))
    expected = run(model, given)
    for name in ("text_keys", "text_values"):
        given[name][4:] = np.nan
    for before, after in zip(expected, run(model, given), strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_graph_without_a_pattern_keeps_its_bytes():
    model = clean_graph(linear())
    assert rewritten(model) is model


def test_16_bits_are_left_alone():
    model = onnx.load_from_string(linear())
    half = onnx.TensorProto.FLOAT16
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = half
    data = model.SerializeToString()
    assert rewritten(data) is data


def test_rewriting_is_deterministic(attend_graphs: dict[str, bytes]):
    backend = OnnxRuntimeBackend()
    first, second = (backend.build(attend_graphs["pruned"]).engine for _ in range(2))
    assert first == second
    names = Counter(name for node in onnx.load_from_string(first).graph.node for name in (node.name, *node.output))
    assert max(names.values()) == 1
