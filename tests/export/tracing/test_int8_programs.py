"""Programs whose linear layers multiply int8 weights and int8 activations."""

from __future__ import annotations

import functools
import io
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvar.core.precision import Precision
from fastvar.engines.aotinductor.native import AVX512_VNNI, build, cpu_lacks
from fastvar.engines.aotinductor.operators import LINEAR_INT8, register
from fastvar.engines.aotinductor.passes import use_int8_gelu, use_onednn_linear
from fastvar.errors import BuildError, InternalError
from fastvar.export.models.common.quantise import SCALE, IntegerFactor, dequantise, integer_linear, quantise
from fastvar.export.models.common.step_graph import WeightShape
from fastvar.export.models.common.weights import Role
from fastvar.export.models.infinity.blocks import AttnMlp
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.tracing.onnx import TracedGraph, torch_type
from fastvar.export.tracing.torch_export import fused_attention, trace_program
from tests.models import tiny_models as tiny

LAYER = "transformer.blocks.0."
W8A8, WEIGHTS_ALONE = Precision("bfloat16", "int8", "int8"), Precision("bfloat16", "int8")
MATRICES = 5  # of the second half of a block


def attn_mlp() -> AttnMlp:
    return AttnMlp(tiny.CONFIG, rows=2, size=(4, 5), kept=20, past=8, text_length=8, cached_size=None, fills=False)


def sources() -> dict[str, Any]:
    found = transformer_weights(tiny.CONFIG, tiny.model().state_dict())
    return {name: found[LAYER + name] for name in AttnMlp.weights}


def shapes() -> dict[str, WeightShape]:
    return {name: WeightShape(source.shape, source.role) for name, source in sources().items()}


@functools.cache
def traced(precision: Precision) -> TracedGraph:
    return trace_program(attn_mlp(), shapes(), precision)


def load(precision: Precision) -> Any:
    register(LINEAR_INT8)
    return torch.export.load(io.BytesIO(traced(precision).graph))


def calls(program: Any) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def stored() -> dict[str, Tensor]:
    """Weights as the weight file has them."""
    found: dict[str, Tensor] = {}
    for name, source in sources().items():
        tensor = source.fetch()
        if source.role is Role.QUANTIZABLE:
            found[name], found[name + SCALE] = quantise(tensor, W8A8)
        else:
            found[name] = tensor.to(torch_type(source.role.dtype(W8A8)))
    return found


def activations() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    taken = (spec for spec in traced(W8A8).inputs if spec.name in attn_mlp().input_shapes())
    return {spec.name: torch.randn(spec.shape, generator=generator).to(torch_type(spec.dtype)) for spec in taken}


def by_module(integers: bool) -> Tensor:
    """x_out as the step module computes it, with integer products or by weights turned back."""
    module, held, weights = attn_mlp(), stored(), {}
    module.attention = fused_attention  # the program's: its roundings would move quantised numbers
    for name, tensor in held.items():
        scale = held.get(name + SCALE)
        if scale is not None:
            weights[name] = IntegerFactor(tensor, scale, integer_linear) if integers else dequantise(tensor, scale)
        elif not name.endswith(SCALE):
            weights[name] = tensor
    with torch.no_grad():
        return module(*activations().values(), weights=weights)[0]


def by_program(program: Any) -> Tensor:
    """The same as the program computes it, in eager torch."""
    (spec,) = traced(W8A8).outputs
    out = torch.zeros(spec.shape)
    with torch.no_grad():
        program.module()(*activations().values(), *stored().values(), out)
    return out


def test_every_matrix_meets_integers_and_the_gelu_goes_with_its_layer():
    program = load(W8A8)
    assert calls(program)["fastvar.linear_int8.default"] == MATRICES
    assert use_int8_gelu(torch, program) == MATRICES
    assert use_onednn_linear(torch, program) == 0
    found = [node for node in program.graph.nodes if "linear_int8" in str(node.target)]
    assert [node.args[-1] for node in found] == [False, False, False, True, False]
    assert not calls(program)["aten.gelu.default"]


def test_weights_alone_stay_a_product_in_the_compute_precision():
    program = load(WEIGHTS_ALONE)
    assert use_int8_gelu(torch, program) == 0
    assert use_onednn_linear(torch, program) == MATRICES
    assert traced(WEIGHTS_ALONE).inputs == traced(W8A8).inputs


def test_a_program_computes_what_its_module_does(engine_cache, monkeypatch):
    if lacking := cpu_lacks(AVX512_VNNI):
        pytest.skip(f"this CPU lacks {', '.join(lacking)}")
    monkeypatch.setenv("FASTVAR_CACHE", str(engine_cache))
    try:
        build()
    except BuildError as error:
        pytest.skip(error.problem)
    program, expected = load(W8A8), by_module(integers=True)
    unquantised = (by_module(integers=False) - expected).norm()
    assert 0 < unquantised < 0.02 * expected.norm()
    assert (by_program(program) - expected).norm() < 0.01 * unquantised
    use_int8_gelu(torch, program)  # one rounding less, which moves quantised numbers behind it
    assert (by_program(program) - expected).norm() < 0.5 * unquantised


def test_a_matrix_of_another_size_is_refused_with_its_name():
    odd = {**shapes(), "ffn.fc1.weight": WeightShape((72, 48), Role.QUANTIZABLE)}
    with pytest.raises(BuildError, match=r"'ffn.fc1.weight' has 72 outputs and 48 inputs\n.*\nfix: .*--weights int8"):
        trace_program(attn_mlp(), odd, W8A8)


def test_an_integer_factor_serves_linear_layers_alone():
    matrix = quantise(torch.randn(16, 8), W8A8)
    factor, x = IntegerFactor(*matrix, integer_linear), torch.randn(3, 8).bfloat16()
    with pytest.raises(InternalError, match=r"expected F\.linear"):
        torch.matmul(x, factor)
    with pytest.raises(InternalError, match=r"expected F\.linear"):
        torch.nn.functional.linear(x, factor)
