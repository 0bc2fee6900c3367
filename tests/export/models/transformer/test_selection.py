"""Which tokens are kept where scores tie, in which order, and where they return to: one rule, whoever computes.

The torch reference, the step modules, graphs on onnxruntime, which restores in its own way, and programs run eagerly.
"""

import ast
import io
from collections.abc import Callable
from fractions import Fraction

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastvar.core.policy import LONGEST_TOPK, in_turns
from fastvar.core.precision import Precision
from fastvar.core.tensors import TensorRef
from fastvar.engines.registry import get_backend
from fastvar.engines.spec import EngineSpec
from fastvar.export.models.common import rows
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.models.infinity.blocks import AttnMlp, Qkv
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.models.transformer import pruning
from fastvar.export.models.transformer.adapter import LAYER_PREFIX
from fastvar.export.tracing.onnx import TracedGraph, layer_weights, trace
from fastvar.export.tracing.torch_export import border, constants, trace_program
from tests.models.tiny_models import CONFIG, model
from tests.test_imports import ROOT, modules

SIZE, KEPT, ROWS = (4, 6), 7, 2


@given(
    values=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1.0, 1.0 + 2**-23, 2.0**100]), min_size=1, max_size=40),
    count=st.integers(1, 40),
)
@settings(deadline=None)
def test_the_largest_come_first_and_of_equal_ones_the_lowest_index(values: list[float], count: int):
    x, count = torch.tensor(values), min(count, len(values))
    found, index = rows.largest(x, count, 0, -3.0)
    expected = sorted(range(len(values)), key=lambda i: -values[i])[:count]  # sorted is stable
    assert index.tolist() == expected
    assert found.tolist() == [values[i] for i in expected]


def tied_tokens() -> Tensor:
    """x [L * R, C]: mirrored pairs of tokens are as far from the mean, in fp32 to the last bit; several pairs alike."""
    half = torch.randint(-4, 5, (SIZE[0] * SIZE[1] // 2, ROWS, CONFIG.width), generator=torch.manual_seed(0)).float()
    half[5:9] = half[4]
    order = torch.randperm(2 * len(half), generator=torch.manual_seed(1))
    return torch.cat((half, -half))[order].reshape(-1, CONFIG.width)


def equally_far_tokens() -> Tensor:
    """x [L * R, C]: all tokens differ, and all are as far from their mean, which is zero."""
    tokens = torch.zeros(SIZE[0] * SIZE[1], ROWS, CONFIG.width)
    for token in range(len(tokens)):
        for row in range(ROWS):
            tokens[token, row, (token // 2 + 5 * row) % CONFIG.width] = 4 if token % 2 else -4
    return tokens.reshape(-1, CONFIG.width)


def equal_tokens() -> Tensor:
    """x [L * R, C]: one token everywhere, whose mean in fp32 need not be itself."""
    return torch.full((SIZE[0] * SIZE[1] * ROWS, CONFIG.width), 0.1)


def by_hand(x: Tensor) -> list[list[int]]:
    """Kept tokens of every guidance row, by Python's stable sort."""
    score = x.view(-1, ROWS, CONFIG.width).square().sum(-1)  # the mean is zero
    return [sorted(range(len(score)), key=lambda i: -float(score[i, row]))[:KEPT] for row in range(ROWS)]


def test_reference_and_modules_keep_the_lowest_of_tied_tokens():
    x = tied_tokens()
    expected = by_hand(x)
    score = x.view(-1, ROWS, CONFIG.width).square().sum(-1)
    for row, kept in enumerate(expected):
        cut = score[kept[-1], row]
        assert (score[:, row] == cut).sum() > sum(score[i, row] == cut for i in kept), "the cut lies between equal ones"
    assert pruning.select(x.view(-1, ROWS, CONFIG.width).transpose(0, 1), KEPT).tolist() == expected
    assert rows.select(x, ROWS, KEPT).t().tolist() == expected


def run(traced: TracedGraph, tensors: dict[str, Tensor]) -> bytes:
    """Compile a graph and launch its engine, which writes its outputs in place; returns the engine."""
    backend = get_backend("onnxruntime")
    target, version = backend.resolve_target(None, Precision()), backend.version()
    engine = backend.build(traced.graph, target).engine
    spec = EngineSpec("t", "", "", len(engine), traced.inputs, traced.outputs, {}, "onnxruntime", target, version)
    refs = {n: TensorRef(t.data_ptr(), str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    backend.load(engine, spec).prepare(refs)()
    return engine


Outputs = dict[str, Tensor]
Runner = Callable[[StepGraph, Outputs], Outputs]


def weights_of(graph: StepGraph) -> dict[str, Tensor]:
    sources = transformer_weights(CONFIG, model().state_dict())
    module = graph.factory(**graph.arguments)
    return {name: sources[p.format(layer=0)].fetch().clone() for name, p in graph.weight_binding(module).items()}


def as_module(graph: StepGraph, given: dict[str, Tensor]) -> Outputs:
    """The step module itself."""
    module = graph.factory(**graph.arguments)
    weights = {name: given[name] for name in module.weights}
    with torch.no_grad():
        results = module(*(given[name] for name in module.inputs), weights=weights)
    return dict(zip(module.outputs, results, strict=True))


def as_engine(graph: StepGraph, given: dict[str, Tensor]) -> Outputs:
    """The graph, compiled for onnxruntime."""
    module = graph.factory(**graph.arguments)
    shapes = layer_weights(transformer_weights(CONFIG, {}), graph.weight_binding(module))
    traced = trace(module, shapes)
    outputs = {s.name: torch.full(s.shape, 99, dtype=getattr(torch, s.dtype)) for s in traced.outputs}
    engine = run(traced, given | outputs)
    if "x_out" in outputs:
        operators = {node.op_type for node in onnx.load_model_from_string(engine).graph.node}
        assert "GreaterOrEqual" not in operators, "restoration was not rewritten"
    return outputs


def as_program(graph: StepGraph, given: dict[str, Tensor]) -> Outputs:
    """The program that is compiled for AOTInductor, traced in stand-in sizes and run eagerly."""
    module, stand_in = graph.factory(**graph.arguments), graph.stand_in()
    shapes = layer_weights(transformer_weights(CONFIG, {}), graph.weight_binding(module))
    archive = trace_program(stand_in.factory(**stand_in.arguments), shapes).graph
    taken, results = border(module, shapes, Precision())
    outputs = {s.name: torch.full(s.shape, 99, dtype=getattr(torch, s.dtype)) for s in results}
    with torch.no_grad():
        program = torch.export.load(io.BytesIO(archive)).module()
        program(*constants(module).values(), *(given[s.name] for s in taken), *outputs.values())
    return outputs


RUNNERS = {"module": as_module, "onnxruntime": as_engine, "program": as_program}
TIES = {"mirrored": tied_tokens, "equally far": equally_far_tokens, "equal": equal_tokens}


@pytest.mark.parametrize("tied", TIES.values(), ids=TIES)
@pytest.mark.parametrize("run_as", RUNNERS.values(), ids=RUNNERS)
def test_whoever_selects_keeps_the_lowest_of_tied_tokens(run_as: Runner, tied: Callable[[], Tensor]):
    arguments = {"config": CONFIG, "rows": ROWS, "size": SIZE, "kept": KEPT, "rope_grid": SIZE}
    graph = StepGraph("qkv", Qkv, arguments, LAYER_PREFIX)
    given = {"x": tied(), "modulation": torch.zeros(ROWS, 6, CONFIG.width), **weights_of(graph)}
    found = run_as(graph, given)
    kept = (found["kept"].view(KEPT, ROWS) // ROWS).t()
    assert kept.tolist() == by_hand(tied())
    reference = pruning.select(tied().view(-1, ROWS, CONFIG.width).transpose(0, 1), KEPT)
    assert reference.tolist() == by_hand(tied())


CACHED, RESTORED = (2, 3), 17
ADDED = {"sa": 3, "ca": 5, "ffn": 8}  # what a restored token gets; a fresh one gets nothing


def restored_by_hand(kept: list[int]) -> tuple[dict[str, list[int]], list[int]]:
    """Selections of every sub-layer on tokens that were all equal, and what each token has become."""
    value, chosen = [0] * (SIZE[0] * SIZE[1]), {}
    for name, added in ADDED.items():
        mean = Fraction(sum(value), len(value))
        ranked = sorted(range(len(value)), key=lambda i: -((value[i] - mean) ** 2))
        chosen[name] = kept if name == "sa" else ranked[: len(kept)]
        value = [v if i in chosen[name] else v + added for i, v in enumerate(value)]
    return chosen, value


def silent_step() -> tuple[StepGraph, dict[str, Tensor]]:
    """The second half of a block whose sub-layers add nothing, on equal tokens and constant maps to restore from."""
    arguments = {"config": CONFIG, "rows": ROWS, "size": SIZE, "kept": RESTORED, "past": 0, "fills": False}
    arguments |= {"text_length": CONFIG.text_length, "cached_size": CACHED}
    graph = StepGraph("attn_mlp", AttnMlp, arguments, LAYER_PREFIX)
    given = {name: torch.zeros(shape) for name, shape in graph.factory(**arguments).input_shapes().items()}
    given |= weights_of(graph)
    for name in ("sa.proj", "ca.proj", "ffn.fc2"):
        given |= {f"{name}.{part}": torch.zeros_like(given[f"{name}.{part}"]) for part in ("weight", "bias")}
    given |= {f"cached_{name}": torch.full_like(given[f"cached_{name}"], added) for name, added in ADDED.items()}
    return graph, given


@pytest.mark.parametrize("run_as", RUNNERS.values(), ids=RUNNERS)
def test_whoever_restores_puts_tied_tokens_where_they_were(run_as: Runner):
    """Kept tokens and restored ones are two groups of equal scores from the second sub-layer on, then three."""
    graph, given = silent_step()
    chosen, value = restored_by_hand(list(range(RESTORED)))
    assert len({tuple(own) for own in chosen.values()}) == 3, "every sub-layer keeps others"
    given["kept"] = rows.rows_of(torch.tensor(chosen["sa"])[:, None].expand(-1, ROWS), ROWS)
    found = run_as(graph, given)
    for name in ("ca", "ffn"):
        kept = (found[f"kept_{name}"].view(RESTORED, ROWS) // ROWS).t()
        assert kept.tolist() == [chosen[name]] * ROWS, name
    assert found["x_out"].view(-1, ROWS, CONFIG.width).tolist() == [[[float(v)] * CONFIG.width] * ROWS for v in value]


def test_the_reference_restores_tied_tokens_where_they_were():
    class Silent:
        def sub_layers(self, *_: object) -> dict[str, pruning.SubLayer]:
            return dict.fromkeys(ADDED, lambda tokens, _: torch.zeros_like(tokens))

    state = pruning.LayerState()
    state.outputs = {name: torch.full((ROWS, CACHED[0] * CACHED[1], 3), float(n)) for name, n in ADDED.items()}
    run = pruning.ScaleRun(SIZE, RESTORED, None, CACHED, writes_restore_cache=False)
    out = pruning.run_block(Silent(), torch.zeros(ROWS, SIZE[0] * SIZE[1], 3), None, run, state, pruned_layer=True)
    chosen, value = restored_by_hand(list(range(RESTORED)))
    assert {name: kept.tolist() for name, kept in state.kept.items()} == {n: [k] * ROWS for n, k in chosen.items()}
    assert out.tolist() == [[[float(v)] * 3 for v in value]] * ROWS


@pytest.mark.parametrize("longest", [rows.LONGEST_TOPK, 3])
def test_exported_graphs_keep_the_lowest_of_tied_tokens(longest: int, monkeypatch: pytest.MonkeyPatch):
    """TopK of ONNX gives the lowest index first, by its definition, and so in turns too."""
    monkeypatch.setattr(rows, "LONGEST_TOPK", longest)
    sources = transformer_weights(CONFIG, model().state_dict())
    step = Qkv(CONFIG, ROWS, SIZE, KEPT, rope_grid=SIZE)
    binding = StepGraph("qkv", Qkv, {}, LAYER_PREFIX).weight_binding(step)
    traced = trace(step, layer_weights(sources, binding))
    given = {"x": tied_tokens(), "modulation": torch.zeros(step.input_shapes()["modulation"])}
    given |= {name: sources[source.format(layer=0)].fetch() for name, source in binding.items()}
    outputs = {spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in traced.outputs}
    run(traced, given | outputs)
    kept = outputs["kept"].numpy()
    assert (kept.reshape(KEPT, ROWS) // ROWS).T.tolist() == by_hand(tied_tokens())
    q, _, _, own = step(given["x"], given["modulation"], weights={name: given[name] for name in binding})
    assert own.tolist() == kept.tolist()
    assert q.shape == (KEPT, ROWS * CONFIG.heads, CONFIG.head_dim)


def test_every_selection_of_a_graph_goes_by_the_same_function(monkeypatch: pytest.MonkeyPatch):
    """Of the block's second half too, where the other sub-layers select for themselves."""
    seen: list[int] = []
    ranked = rows.largest

    def counted(x: Tensor, count: int, dim: int, lowest: float) -> tuple[Tensor, Tensor]:
        seen.append(count)
        return ranked(x, count, dim, lowest)

    monkeypatch.setattr(rows, "largest", counted)
    step = AttnMlp(CONFIG, ROWS, SIZE, KEPT, 0, CONFIG.text_length, (2, 3), fills=False)
    sources = transformer_weights(CONFIG, model().state_dict())
    weights = {name: sources[LAYER_PREFIX.format(layer=0) + name].fetch() for name in step.weights}
    given = {name: torch.zeros(shape) for name, shape in step.input_shapes().items()}
    given["kept"] = torch.arange(KEPT * ROWS)
    step(*(given[name] for name in step.inputs), weights=weights)
    assert seen == [KEPT, KEPT]


RANKERS = {"topk", "argsort", "argpartition", "kthvalue", "msort"}
RANK_CODES_AS_PUBLISHED = {"export/models/codebook/reference.py"}  # which the graphs' ranking is tested against


def test_nobody_in_the_package_ranks_on_their_own():
    found = {
        str(path.relative_to(ROOT))
        for path in modules(ROOT).values()
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Attribute) and node.attr in RANKERS
    }
    assert found - RANK_CODES_AS_PUBLISHED == {"export/models/common/rows.py"}


@pytest.mark.parametrize("count", [1, LONGEST_TOPK, LONGEST_TOPK + 1, 2 * LONGEST_TOPK + 1])
def test_estimates_and_graphs_agree_on_who_ranks_in_turns(count: int, monkeypatch: pytest.MonkeyPatch):
    turns: list[int] = []
    topk = torch.topk
    monkeypatch.setattr(torch, "topk", lambda x, k, dim: (turns.append(k), topk(x, k, dim=dim))[1])
    with rows.topk_operator():
        rows.largest(torch.arange(2 * LONGEST_TOPK + 5.0), count, 0, -1.0)
    assert in_turns(count) == (len(turns) > 1)
    assert sum(turns) == count
    assert max(turns) <= LONGEST_TOPK
