"""What happens to a program before it is compiled for a GPU: none of it needs one, or a CUDA build of torch."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvar.core.plan import Batch
from fastvar.core.precision import Precision
from fastvar.engines.aotinductor.backend import AotInductorBackend
from fastvar.engines.aotinductor.gpu_program import (
    _join_channels,
    arrays_declared_alike,
    gpu_options,
    known_options,
    mend,
    moved_to_gpu,
    with_lasting_method,
)
from fastvar.engines.aotinductor.graph import value_of
from fastvar.errors import BuildError
from fastvar.export.assembly import assemble
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.tracing.torch_export import trace_program
from fastvar.families.infinity import ImageTokenizerConfig
from tests.models import tiny_models as tiny

BF16 = Precision("bfloat16")
IMAGES = ImageTokenizerConfig(bits=6, base_channels=32, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1)


def graphs() -> dict[str, StepGraph]:
    made = assemble(tiny.plan(), tiny.CONFIG, IMAGES, None, tiny.CONFIG.text_length, [Batch(2)])
    return {graph.factory.__name__: graph for graph in made.graphs.values()}


def program_of(graph: StepGraph) -> Any:
    """A program as a backend gets it: exported, saved and loaded."""
    return torch.export.load(io.BytesIO(archive_of(graph)))


def archive_of(graph: StepGraph) -> bytes:
    from fastvar.export.checkpoints.random_weights import random_checkpoint_for
    from fastvar.export.checkpoints.weight_sources import engine_weights
    from fastvar.export.tracing.onnx import layer_weights

    graph = graph.stand_in()
    checkpoint = random_checkpoint_for(tiny.CONFIG, IMAGES)
    module: Any = graph.factory(**graph.arguments)
    weights = layer_weights(engine_weights(checkpoint, False, BF16), graph.weight_binding(module), graph.layer)
    return trace_program(module, weights, BF16).graph


def placeholders(program: Any) -> list[Any]:
    return [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]


@pytest.mark.parametrize("kind", ["Qkv", "AttnMlp", "SamplingHead", "InfinityImageDecoder"])
def test_nothing_is_asserted_of_the_device_that_a_program_was_traced_on(kind: str):
    program = program_of(graphs()[kind])
    asserting = torch.ops.aten._assert_tensor_metadata.default
    assert any(node.target is asserting for node in program.graph.nodes), "what this test is about"
    mend(torch, program)
    assert not any(node.target is asserting for node in program.graph.nodes)


def test_the_device_that_a_program_is_moved_to_has_a_number(monkeypatch: pytest.MonkeyPatch):
    """torch asserts of every tensor that it is on the device it was moved to; "cuda" is none that a tensor is on."""
    moved: list[str] = []
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr("torch.export.passes.move_to_device_pass", lambda program, device: moved.append(device))
    backend = AotInductorBackend(target="cuda-sm90")
    with pytest.raises(BuildError, match="cannot compile the program"):
        backend.build(archive_of(graphs()["Qkv"]), "cuda-sm90")
    assert moved == ["cuda:3"]


@pytest.mark.parametrize("device", ["cpu", "meta"])  # "meta" makes whole what it is given, as a GPU does
def test_shapes_alone_are_moved_to_a_gpu(device: str):
    """Neither the decoder's parameters, which come from outside, nor the examples that it was traced with."""

    def tensors(program: Any) -> dict[str, Any]:
        leaves = torch.utils._pytree.tree_leaves(program.example_inputs)
        return dict(program.state_dict) | {str(number): tensor for number, tensor in enumerate(leaves)}

    program = program_of(graphs()["InfinityImageDecoder"])
    before = {name: (value.shape, value.dtype) for name, value in tensors(program).items()}
    assert any(value.is_meta for value in program.state_dict.values()), "what this test is about"
    moved = tensors(moved_to_gpu(torch, program, device))
    assert {name: (value.shape, value.dtype) for name, value in moved.items()} == before
    assert {str(value.device) for value in moved.values()} == {device}
    assert sum(value.untyped_storage().nbytes() for value in moved.values()) < 4096


@pytest.mark.parametrize("kind", ["Qkv", "AttnMlp", "SamplingHead"])
def test_every_open_size_has_the_value_of_the_example(kind: str):
    program = program_of(graphs()[kind])
    sizes = [example.shape for example in torch.utils._pytree.tree_leaves(program.example_inputs)]
    mend(torch, program)
    opened = 0
    for value, shape in zip(placeholders(program)[-len(sizes) :], sizes, strict=True):
        for size, number in zip(value.shape, shape, strict=True):
            if isinstance(size, torch.SymInt):
                opened += 1
                known = size.node.shape_env.backed_var_to_val
                assert size.node.expr.subs(known) == number
    assert opened, "what this test is about"


class Runners:
    """torch's loaders of compiled libraries."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def AOTIModelContainerRunnerCuda(self, *arguments: Any) -> object:  # noqa: N802  torch's name
        self.asked.append(arguments)
        return object()


def test_a_library_for_a_gpu_is_run_by_one_thread(monkeypatch: pytest.MonkeyPatch):
    """Else each run asks an event of the run before it: a capture refuses that, and a scale runs a library often."""
    runners = Runners()
    monkeypatch.setattr("torch._C._aoti", runners)
    AotInductorBackend(target="cuda-sm90")._runner("engine.so")
    assert runners.asked == [("engine.so", 1, "cuda", "", True)]


def test_options_are_those_that_the_installed_torch_knows():
    wanted = {"shape_padding": False, "no_such_option": 1}
    assert known_options(torch, wanted) == {"shape_padding": False}
    assert gpu_options(torch)["aot_inductor.embed_kernel_binary"] is True


class Lines:
    """A buffer that code is written to."""

    def write(self, line: str) -> None: ...


def test_an_array_is_looked_for_under_a_method_that_lasts():
    """As torch 2.11 looks for it: under the address of a method object, which the next one takes over."""

    class Generator: ...

    def declare(generator: Any, array: str, method: Any, known: bool = False) -> str:
        return f"{array} {known} {id(method)}"

    first, second, generator = Lines(), Lines(), Generator()
    plain = [declare(generator, "{1L}", lines.write) for lines in (first, second)]
    assert plain[0] == plain[1], "what this test is about"
    steady = with_lasting_method(declare)
    found = [steady(generator, "{1L}", lines.write, known=True) for lines in (first, second, first)]
    kept = [[] for _ in range(64)] + [first.write for _ in range(64)]  # other objects take addresses that are free
    found += [steady(generator, "{1L}", lines.write, known=True) for lines in (first, second)]
    assert len(set(found)) == 2
    assert found[0] == found[2] == found[3] != found[1] == found[4]
    assert len(kept) == 128


def test_torch_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    own = CppWrapperCpu.codegen_int_array_var
    with arrays_declared_alike(torch):
        assert (CppWrapperCpu.codegen_int_array_var is own) == (torch.__version__ >= (2, 13))
    monkeypatch.setattr("torch.__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    with arrays_declared_alike(torch):
        assert CppWrapperCpu.codegen_int_array_var.__wrapped__ is own
    assert CppWrapperCpu.codegen_int_array_var is own


SDPA = torch.ops.aten.scaled_dot_product_attention.default


class OfAConvolution(nn.Module):
    """Attention over a grid, whose channels lie as a convolution leaves them; values side by side."""

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.flatten(2).transpose(1, 2)[:, None]  # [B, 1, h * w, C]
        return nn.functional.scaled_dot_product_attention(channels_last, channels_last, channels_last.contiguous())


def test_attention_is_given_channels_that_lie_side_by_side():
    x = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    program = torch.export.export(OfAConvolution(), (x,))
    expected = program.module()(x)
    (call,) = program.graph.find_nodes(op="call_function", target=SDPA)
    assert [value_of(argument).stride(-1) == 1 for argument in call.args] == [False, False, True]
    _join_channels(torch, program)
    (call,) = program.graph.find_nodes(op="call_function", target=SDPA)
    assert all(value_of(argument).stride(-1) == 1 for argument in call.args)
    contiguous = program.graph.find_nodes(op="call_function", target=torch.ops.aten.contiguous.default)
    assert len(contiguous) == 3, "the one that was there, and those of queries and keys"
    torch.testing.assert_close(program.module()(x), expected)
