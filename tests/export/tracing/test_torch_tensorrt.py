"""Torch-TensorRT needs a GPU as soon as it is imported: a stand-in records what it would be asked."""

import lzma
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvar.core.precision import Precision
from fastvar.engines.spec import TensorSpec
from fastvar.errors import BackendError, BuildError
from fastvar.export.models.infinity.blocks import AttnMlp
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.toolchain import make_toolchain
from fastvar.export.tracing.onnx import layer_weights, trace
from fastvar.export.tracing.torch_tensorrt import compile_exported
from tests.models import tiny_models as tiny

BF16 = Precision("bfloat16")


def attn_mlp() -> tuple[AttnMlp, Any]:
    module = AttnMlp(tiny.CONFIG, 2, (4, 5), 12, 16, 8, (3, 4), False)
    binding = {name: f"transformer.blocks.{{layer}}.{name}" for name in module.weights}
    return module, layer_weights(transformer_weights(tiny.CONFIG, {}), binding)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    def convert(program: Any, **options: Any) -> bytes:
        asked.update(options, program=program)
        return b"a plan"

    library = SimpleNamespace(
        __version__="0", dynamo=SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert)
    )
    monkeypatch.setitem(sys.modules, "torch_tensorrt", library)
    return asked


def test_every_binding_is_named_as_in_the_graph_from_onnx(asked: dict[str, Any]):
    module, weights = attn_mlp()
    engine = compile_exported(module, weights, BF16)
    traced = trace(module, weights, BF16)
    assert lzma.decompress(engine.engine) == b"a plan"
    assert (set(engine.inputs), engine.outputs) == (set(traced.inputs), traced.outputs)
    assert asked["arg_input_binding_names"] == module.inputs
    assert asked["kwarg_input_binding_names"] == {"weights": {name: name for name in module.weights}}
    assert asked["output_binding_names"] == module.outputs
    assert TensorSpec("x", "float32", (40, tiny.CONFIG.width)) in engine.inputs


def test_names_have_the_shape_of_what_they_name(asked: dict[str, Any]):
    """Torch-TensorRT matches them as trees."""
    module, weights = attn_mlp()
    compile_exported(module, weights, BF16)
    flatten = torch.utils._pytree.tree_structure
    for names, values in (("arg_input_binding_names", "arg_inputs"), ("kwarg_input_binding_names", "kwarg_inputs")):
        assert flatten(asked[names]) == flatten(asked[values])


def test_the_exported_program_computes_what_the_module_does(asked: dict[str, Any]):
    module, weights = attn_mlp()
    compile_exported(module, weights, Precision())
    torch.manual_seed(0)
    inputs = [torch.randn_like(t) if t.is_floating_point() else torch.arange(24) for t in asked["arg_inputs"]]
    matrices = {n: torch.randn_like(t) for n, t in asked["kwarg_inputs"]["weights"].items()}
    expected = module(*inputs, weights=matrices)
    torch.testing.assert_close(asked["program"].module()(*inputs, weights=matrices), expected)


def test_what_it_cannot_convert_names_the_step(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]):
    def refuse(*_: Any, **__: Any) -> bytes:
        raise RuntimeError("no converter for aten.topk")

    dynamo = sys.modules["torch_tensorrt"].dynamo
    monkeypatch.setattr(dynamo, "convert_exported_program_to_serialized_trt_engine", refuse)
    with pytest.raises(BuildError, match=r"cannot convert AttnMlp: no converter for aten\.topk"):
        compile_exported(*attn_mlp(), BF16)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(BackendError) as error:
        compile_exported(*attn_mlp(), BF16)
    assert "fastvar-runtime[torch-tensorrt]" in error.value.fix


@pytest.mark.parametrize(
    ("backend", "weights", "via", "problem"),
    [
        ("onnxruntime", None, "torch-tensorrt", "for the backend tensorrt"),
        ("onnxruntime", None, "carrier pigeon", "no way 'carrier pigeon'"),
    ],
)
def test_ways_that_lead_nowhere(backend: str, weights: str | None, via: str, problem: str):
    with pytest.raises(BuildError, match=problem):
        make_toolchain(backend, weights=weights, via=via)
