import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastvar.core.precision import Precision
from fastvar.core.tensors import TensorRef
from fastvar.engines.aotinductor.backend import AotInductorBackend
from fastvar.engines.aotinductor.engine_file import ProgramFile
from fastvar.engines.base import PROGRAM
from fastvar.engines.cache.engine_cache import EngineCache
from fastvar.engines.cache.lock import FolderLock
from fastvar.engines.registry import get_backend
from fastvar.engines.spec import EngineSpec
from fastvar.errors import BackendError, BuildError, BundleError
from fastvar.export.assembly import LAYER_PREFIX
from fastvar.export.factory import EngineFactory
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.models.infinity.blocks import AttnMlp
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.module_backend import ModuleEngine
from fastvar.export.toolchain import make_toolchain
from tests.export.tracing.test_torch_export import example
from tests.models import tiny_models as tiny

BF16 = Precision("bfloat16")


@pytest.fixture
def backend() -> AotInductorBackend:
    return AotInductorBackend()


def spec(**changed: Any) -> EngineSpec:
    made = AotInductorBackend()
    target, version = made.resolve_target(None, Precision()), made.version()
    return replace(EngineSpec("e", "e", "", 0, (), (), {}, "aotinductor", target, version), **changed)


def test_is_found_by_name_and_reads_programs():
    found = get_backend("aotinductor")
    assert isinstance(found, AotInductorBackend)
    assert found.graph_form == PROGRAM
    assert found.runs_on_host("cpu-avx2")
    assert not found.runs_on_host("cuda-sm90")
    assert found.stamp() != found.version(), "another kernel or pass makes another engine"


def test_refuses_what_it_cannot_build_for(backend: AotInductorBackend):
    with pytest.raises(BuildError, match="no target 'sm86'"):
        backend.resolve_target("sm86", BF16)
    with pytest.raises(BuildError, match="fp8 weights are for GPUs"):
        backend.resolve_target(None, Precision("bfloat16", "float8_e4m3fn"))
    with pytest.raises(BackendError, match="0 threads"):
        AotInductorBackend(threads=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there():
    with pytest.raises(BackendError, match="torch finds no GPU") as caught:
        AotInductorBackend(target="cuda").device()
    assert "leave --target away" in caught.value.fix
    with pytest.raises(BuildError, match=r"target cuda means the GPU in this machine: there is none\nexpected: .*sm90"):
        AotInductorBackend(target="cuda").resolve_target("cuda", BF16)


@pytest.mark.parametrize(
    ("given", "resolved"),
    [("cuda-sm90", "cuda-sm90"), ("cuda-sm86-cudnn", "cuda-sm86-cudnn"), ("cuda-sm80-flash", "cuda-sm80")],
)
def test_gpus_by_name(given: str, resolved: str):
    assert AotInductorBackend(target=given).resolve_target(given, BF16) == resolved


@pytest.mark.parametrize("given", ["cuda-sm75", "cuda-sm90-triton", "cuda-flash-sm90", "cuda-sm90-x-cudnn"])
def test_no_such_gpu(given: str):
    with pytest.raises(BuildError, match=f"builds for no GPU '{given}'\nexpected: cuda or one of cuda-sm80, "):
        AotInductorBackend(target=given).resolve_target(given, BF16)


def test_the_attention_of_a_gpu_is_chosen_and_of_nothing_else():
    choose = AotInductorBackend.with_attention
    assert (choose("cuda", "cudnn"), choose("cuda-sm90-cudnn", "flash")) == ("cuda-cudnn", "cuda-sm90")
    for target, kernel in ((None, "flash"), ("cpu-avx2", "cudnn"), ("cuda", "triton")):
        with pytest.raises(BuildError, match="expected: flash or cudnn, with --target cuda"):
            choose(target, kernel)


def test_refuses_bytes_that_are_no_program(backend: AotInductorBackend):
    for graph in (b"", b"no program", ProgramFile.of(b"").to_bytes()):
        with pytest.raises(BuildError, match="not a program that torch"):
            backend.build(graph, "cpu-avx2")


def doubled(rows: int) -> bytes:
    """A program of so many rows, as it is exported."""

    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x

    file = io.BytesIO()
    torch.export.save(torch.export.export(Doubled(), (torch.zeros(rows, 4),)), file)
    return file.getvalue()


def test_programs_are_compiled_apart_from_each_other(backend: AotInductorBackend, monkeypatch: pytest.MonkeyPatch):
    """By programs that differ in a size alone, in folders of their own, which nobody else has meanwhile."""
    folders: list[str] = []

    def compiled(program: Any, package_path: str, inductor_configs: dict[str, Any]) -> None:
        folders.append(torch._inductor.config.aot_inductor.output_path)
        with pytest.raises(BundleError, match="another build into"):
            FolderLock(Path(torch._inductor.codecache.cache_dir()) / folders[-1]).acquire()
        raise RuntimeError("seen enough")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compiled)
    for rows in (2, 3, 2):
        with pytest.raises(BuildError, match="seen enough"):
            backend.build(doubled(rows), "cpu-avx2")
    assert folders[0] == folders[2] != folders[1]
    free = FolderLock(Path(torch._inductor.codecache.cache_dir()) / folders[0])
    free.acquire()
    free.release()


def test_refuses_engines_of_others(backend: AotInductorBackend):
    with pytest.raises(BackendError, match=r"version .* is installed"):
        backend.load(b"", spec(library_version="2.9.0"))
    with pytest.raises(BundleError, match="not an engine of AOTInductor"):
        backend.load(b"garbage", spec())
    with pytest.raises(BackendError, match="cannot load engine 'e'"):
        backend.load(ProgramFile.of(b"no library").to_bytes(), spec())


def attn_mlp(size: tuple[int, int], kept: int, past: int) -> StepGraph:
    sizes = {"rows": 2, "size": size, "kept": kept, "past": past, "text_length": 8}
    arguments = {"config": tiny.CONFIG, **sizes, "cached_size": (3, 4), "fills": False}
    return StepGraph(f"attn_mlp-{size[0]}", AttnMlp, arguments, LAYER_PREFIX)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_one_compiled_library_runs_two_scales(engine_cache: Path, precision: str, tolerance: float):
    """In 16 bits with this CPU's own instructions: kernels, passes, open sizes, and results where they belong.

    In fp16 also on CPUs without products of it, where oneDNN refuses them.
    """
    sources = transformer_weights(tiny.CONFIG, tiny.model().state_dict())
    factory = EngineFactory(make_toolchain("aotinductor", precision=precision), EngineCache(engine_cache), sources)
    graphs = {graph.name: graph for graph in (attn_mlp((4, 5), 12, 16), attn_mlp((6, 8), 12, 48))}
    made = factory.make(graphs, lambda _: None)
    assert (factory.compiled <= 1, len(made)) == (True, 2), "or it was compiled before"
    backend = AotInductorBackend()
    tools = factory.toolchain
    libraries = set()
    for name, built in made.items():
        engine, module = built.engine, graphs[name].factory(**graphs[name].arguments)
        border = {"inputs": engine.inputs, "outputs": engine.outputs, "weights": built.weights}
        described = spec(name=name, target=tools.target, **border)
        libraries.add(ProgramFile.from_bytes(engine.engine).library)
        weights = {n: sources[p.format(layer=0)].fetch() for n, p in built.weights.items()}
        found = run(backend.load(engine.engine, described), described, weights)
        again = run(backend.load(engine.engine, described), described, weights, threads=1)
        assert bool(backend.load(engine.engine, described).packs) == (precision == "bf16")
        assert backend.load(engine.engine, described).packed is not None
        backend.pack_weights(False)
        plain = backend.load(engine.engine, described)
        assert plain.packed is None
        for tensor, values in run(plain, described, weights).items():
            np.testing.assert_array_equal(values, found[tensor])
        backend.pack_weights(True)
        expected = run(ModuleEngine(module, described, tools.precision), described, weights)
        for tensor in described.outputs:
            np.testing.assert_array_equal(again[tensor.name], found[tensor.name])
            if tensor.dtype != "int64":  # a token less or more where scores nearly tie
                error = np.abs(found[tensor.name] - expected[tensor.name])
                assert np.quantile(error, 0.9) < tolerance, tensor.name
    assert len(libraries) == 1


def run(engine: Any, described: EngineSpec, weights: dict[str, torch.Tensor], threads: int = 2) -> dict[str, Any]:
    """Outputs by name, for the same random inputs every time."""
    torch.manual_seed(1)
    total = described.tensor("x").shape[0]
    held = {}
    for tensor in (*described.inputs, *described.outputs):
        made = weights.get(tensor.name)
        made = example(tensor.name, tensor.shape, tensor.dtype, total) if made is None else made
        held[tensor.name] = made.to(getattr(torch, tensor.dtype)).contiguous()
    refs = {n: TensorRef(t.data_ptr(), str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in held.items()}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine.prepare(refs)()
    finally:
        torch.set_num_threads(before)
    return {tensor.name: held[tensor.name].float().numpy() for tensor in described.outputs}
