"""Which tokens are kept where scores tie, and in which order: the same in reference, modules and graphs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
from tests.models.tiny_models import CONFIG, model

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


def run(traced: TracedGraph, tensors: dict[str, Tensor]) -> None:
    """Compile a graph and launch its engine, which writes its outputs in place."""
    backend = get_backend("onnxruntime")
    target, version = backend.resolve_target(None, Precision()), backend.version()
    engine = backend.build(traced.graph, target).engine
    spec = EngineSpec("t", "", "", len(engine), traced.inputs, traced.outputs, {}, "onnxruntime", target, version)
    refs = {n: TensorRef(t.data_ptr(), str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()}
    backend.load(engine, spec).prepare(refs)()


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
