import onnx
import pytest

from fastvar.core.precision import Precision
from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend
from fastvar.engines.onnxruntime.needs import GraphNeeds, graph_needs
from fastvar.export.models.common.step_graph import StepGraph, WeightShape
from fastvar.export.models.common.weights import Role
from fastvar.export.models.infinity.blocks import AttnMlp, Qkv
from fastvar.export.models.infinity.steps import SamplingHead
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.tracing.onnx import layer_weights, trace
from fastvar.families.infinity import TransformerConfig
from tests.export.tracing.memory import WEIGHT_BYTES, growth, text_encoder

# One block of this model weighs 15 MB, so a graph that held even one of its matrices could not be small.
WIDE = TransformerConfig(
    depth=1, width=512, heads=8, mlp_width=2048, text_width=128, text_length=8, code_channels=16, chunks=1
)
LAYER = "transformer.blocks.{layer}."
SIZE, CACHED = (6, 6), (4, 4)


def qkv(kept: int = 18) -> StepGraph:
    arguments = {"config": WIDE, "rows": 2, "size": SIZE, "kept": kept, "rope_grid": (64, 64)}
    return StepGraph("qkv", Qkv, arguments, LAYER)


def attn_mlp(kept: int = 18, past: int = 16) -> StepGraph:
    sizes = {"rows": 2, "size": SIZE, "kept": kept, "past": past, "text_length": 8}
    return StepGraph("attn_mlp", AttnMlp, {"config": WIDE, **sizes, "cached_size": CACHED, "fills": False}, LAYER)


def sampling_head() -> StepGraph:
    sizes = {"rows": 2, "size": SIZE, "final": (8, 8), "next_size": (8, 8), "next_index": 3}
    return StepGraph("sampling_head", SamplingHead, {"config": WIDE, **sizes}, "transformer.")


def traced(graph: StepGraph, precision: Precision | None = None):
    module = graph.factory(**graph.arguments)
    return trace(module, layer_weights(transformer_weights(WIDE, {}), graph.weight_binding(module)), precision)


@pytest.mark.parametrize("graph", [qkv(), attn_mlp(), sampling_head()], ids=lambda g: g.name)
def test_no_weight_is_inside_a_step_graph(graph: StepGraph):
    result = traced(graph)
    assert len(result.graph) < 100_000
    model = onnx.load_from_string(result.graph)
    module = graph.factory(**graph.arguments)
    names = [value.name for value in model.graph.input]
    assert names == [*module.input_shapes(), *module.weights]
    assert [value.name for value in model.graph.output] == list(module.outputs)
    assert not {i.name for i in model.graph.initializer} & set(names)


def test_no_weight_takes_memory_while_a_graph_is_traced():
    module, weights = text_encoder()
    trace(*text_encoder())  # what libraries keep for the process is there
    assert growth(lambda: trace(module, weights)) < WEIGHT_BYTES // 4


@pytest.mark.parametrize("graph", [qkv(), attn_mlp(), sampling_head()], ids=lambda g: g.name)
def test_graphs_and_engines_ask_for_no_more_than_old_libraries_have(graph: StepGraph):
    """onnxruntime 1.23 knows ONNX 23 and IR 11; of its own operators the first set is there in every version."""
    exported = traced(graph).graph
    assert graph_needs(exported) == GraphNeeds(10, {"": 23})
    needs = graph_needs(OnnxRuntimeBackend().build(exported).engine)
    assert needs is not None
    assert needs.ir_version == 10
    assert needs.opsets.items() <= {("", 23), ("com.microsoft", 1)}


def test_every_shape_is_static():
    for spec in (*traced(attn_mlp()).inputs, *traced(attn_mlp()).outputs):
        assert all(size > 0 for size in spec.shape)


def test_tracing_is_deterministic_and_names_no_path_of_this_machine():
    first, second = traced(sampling_head()), traced(sampling_head())
    assert first == second
    assert b".py" not in first.graph


def test_keys_tell_graphs_apart():
    def key(graph: StepGraph, width: int = 512, compute: str = "float32", role: Role = Role.FP32) -> str:
        return graph.key({"ada_gss": WeightShape((6, width), role)}, Precision(compute))

    assert key(attn_mlp()) == key(attn_mlp())
    different = {key(attn_mlp()), key(attn_mlp(kept=17)), key(attn_mlp(past=17)), key(qkv()), key(attn_mlp(), 256)}
    different |= {key(attn_mlp(), compute="bfloat16"), key(attn_mlp(), role=Role.QUANTIZABLE)}
    assert len(different) == 7
