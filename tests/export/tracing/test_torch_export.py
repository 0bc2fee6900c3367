"""Programs of open sizes: traced once in stand-in sizes, they compute at every scale what its own module computes."""

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvar.core.plan import Batch, GenerationPlan
from fastvar.core.precision import Precision
from fastvar.export.assembly import assemble
from fastvar.export.models.common.quantise import SCALE, quantise
from fastvar.export.models.common.rows import rows_of
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.models.common.weights import WeightSource
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.tracing.onnx import layer_weights, torch_type
from fastvar.export.tracing.torch_export import border, constants, trace_program
from fastvar.families.infinity import ImageTokenizerConfig
from tests.export.tracing.memory import WEIGHT_BYTES, growth, text_encoder
from tests.models import tiny_models as tiny

FP32, INT8 = Precision(), Precision(weights="int8")
IMAGES = ImageTokenizerConfig(tiny.CONFIG.bits, 32, (1, 1), 1)
GUIDANCE_OFF = tiny.plan(tiny.without_guidance(tiny.POLICY, 6))
ONE_SELECTION = tiny.plan(replace(tiny.POLICY, shared_selection=True))


@pytest.fixture(scope="module")
def sources() -> dict[str, WeightSource]:
    return transformer_weights(tiny.CONFIG, tiny.model().state_dict())


def step_graphs(plan: GenerationPlan) -> list[StepGraph]:
    made = assemble(plan, tiny.CONFIG, IMAGES, None, tiny.CONFIG.text_length, [Batch(2)])
    return [made.graphs[name] for name in made.step_graphs]


def example(name: str, shape: tuple[int, ...], dtype: str, total: int) -> Tensor:
    """Random values; for kept tokens different ones for each of two rows, or of one."""
    if name == "kept":
        rows = 2 if total % 2 == 0 and shape[0] < total else 1
        tokens = [torch.randperm(total // rows)[: shape[0] // rows] for _ in range(rows)]
        return rows_of(torch.stack(tokens, dim=1), rows)
    if dtype == "int64":
        return torch.zeros(shape, dtype=torch.int64)
    return torch.rand(shape) if name in ("tau", "cut", "noise", "guidance") else torch.randn(shape)


def given(module: Any, weights: dict[str, Tensor], specs: Any) -> dict[str, Tensor]:
    total = module.input_shapes().get("x", (0,))[0]
    return {s.name: weights[s.name] if s.name in weights else example(s.name, s.shape, s.dtype, total) for s in specs}


class Programs:
    """Traces stand-ins, each once."""

    def __init__(self, sources: dict[str, WeightSource], precision: Precision = FP32) -> None:
        self._sources, self._precision = sources, precision
        self.traced: dict[str, nn.Module] = {}

    def weight_shapes(self, graph: StepGraph) -> Any:
        module: Any = graph.factory(**graph.arguments)
        return layer_weights(self._sources, graph.weight_binding(module), graph.layer)

    def of(self, graph: StepGraph) -> nn.Module:
        stand_in, weights = graph.stand_in(), self.weight_shapes(graph)
        key = stand_in.key(weights, self._precision)
        if key not in self.traced:
            archive = trace_program(stand_in.factory(**stand_in.arguments), weights, self._precision).graph
            self.traced[key] = torch.export.load(io.BytesIO(archive)).module()
        return self.traced[key]


@pytest.mark.slow
def test_one_program_serves_all_scales(sources: dict[str, WeightSource]):
    programs = Programs(sources)
    graphs = [graph for graph in step_graphs(GUIDANCE_OFF) if hasattr(graph.factory, "stand_in")]
    graphs += [graph for graph in step_graphs(ONE_SELECTION) if graph.name.endswith("-shared")]
    for graph in graphs:
        torch.manual_seed(len(graph.name))
        module: Any = graph.factory(**graph.arguments)
        weights = {n: sources[p.format(layer=0)].fetch().clone() for n, p in graph.weight_binding(module).items()}
        taken, results = border(module, programs.weight_shapes(graph), FP32)
        tensors = given(module, weights, taken)
        memory = [torch.full(s.shape, 9, dtype=torch_type(s.dtype)) for s in results]
        with torch.no_grad():
            expected = module(*(tensors[name] for name in module.inputs), weights=weights)
            programs.of(graph)(*constants(module).values(), *tensors.values(), *memory)
        for spec, found, wanted in zip(results, memory, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5, msg=f"{graph.name}: {spec.name}")
    assert len(programs.traced) < len(graphs) * 3 / 4


def test_equal_stand_ins_have_one_key_whatever_the_scale(sources: dict[str, WeightSource]):
    programs = Programs(sources)

    def key(**sizes: Any) -> str:
        arguments = {"config": tiny.CONFIG, "rows": 2, "rope_grid": (6, 8), **sizes}
        graph = StepGraph("qkv", step_graphs(tiny.plan())[2].factory, arguments, "transformer.blocks.{layer}.")
        return graph.stand_in().key(programs.weight_shapes(graph), FP32)

    assert key(size=(4, 5), kept=20) == key(size=(30, 7), kept=210)
    assert key(size=(4, 5), kept=12) == key(size=(64, 64), kept=3999)
    sizes = [((1, 1), 1), ((4, 5), 20), ((4, 5), 12), ((4, 5), 1)]
    different = [key(size=size, kept=kept) for size, kept in sizes]
    assert len(set(different)) == len(different), "sizes of one and pruning are compiled apart"


def test_no_weight_takes_memory_while_a_program_is_traced_saved_and_loaded():
    sizes: list[int] = []

    def through() -> None:
        archive = trace_program(*text_encoder()).graph
        sizes.append(len(archive))
        program = torch.export.load(io.BytesIO(archive))
        given = {tuple(example.shape) for example in torch.utils._pytree.tree_leaves(program.example_inputs)}
        assert (1 << 17, 512) in given, "the shapes of weights are those that it was traced with"

    through()  # what libraries keep for the process is there
    assert growth(through) < WEIGHT_BYTES // 4
    assert max(sizes) < 1 << 20


def test_quantised_weights_are_taken_as_they_are_stored(sources: dict[str, WeightSource]):
    graph = next(graph for graph in step_graphs(tiny.plan()) if graph.name.startswith("qkv"))
    module: Any = graph.factory(**graph.arguments)
    weights = Programs(sources, INT8).weight_shapes(graph)
    traced = trace_program(module, weights, INT8)
    stored = {spec.name: spec for spec in traced.inputs}
    width = tiny.CONFIG.width
    assert (stored["sa.qkv.weight"].dtype, stored["sa.qkv.weight"].shape) == ("int8", (width, 3 * width))
    assert stored["sa.qkv.weight" + SCALE].shape == (3 * width,)
    matrix = sources["transformer.blocks.0.sa.qkv.weight"].fetch()
    values, scale = quantise(matrix, INT8)
    plain = {n: sources[p.format(layer=0)].fetch() for n, p in graph.weight_binding(module).items()}
    fresh: Any = graph.factory(**graph.arguments)
    tensors = given(fresh, {**plain, "sa.qkv.weight": values, "sa.qkv.weight" + SCALE: scale}, traced.inputs)
    memory = [torch.zeros(s.shape, dtype=torch_type(s.dtype)) for s in traced.outputs]
    with torch.no_grad():
        torch.export.load(io.BytesIO(traced.graph)).module()(*constants(fresh).values(), *tensors.values(), *memory)
        meant = {**plain, "sa.qkv.weight": (values * scale).t()}
        expected = fresh(tensors["x"], tensors["modulation"], weights=meant)
    for found, wanted in zip(memory, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
