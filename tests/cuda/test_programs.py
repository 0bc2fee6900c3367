"""Every program of a small model of each family, and of Infinity-2B, compiles for GPUs that are not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from fastvar.core.plan import GenerationPlan
from fastvar.engines.aotinductor.engine_file import ProgramFile
from fastvar.engines.cache.engine_cache import EngineCache
from fastvar.engines.spec import EngineSpec
from fastvar.errors import BackendError
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.weight_sources import engine_weights, preview_weights
from fastvar.export.describe import assemble_checkpoint
from fastvar.export.factory import BuiltEngine, EngineFactory
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import toolchain_of
from tests.cuda import models

ELF, CUDA_MACHINE = b"\x7fELF", 190  # of machine code for GPUs


def compiled(
    model: tuple[Checkpoint, GenerationPlan], options: BuildOptions, cache: Path, one_of_a_kind: bool = False
) -> tuple[Mapping[str, BuiltEngine], int]:
    """Engines by name, and how many programs they share; of all graphs, or of one of each kind."""
    checkpoint, plan = model
    tools, graphs = toolchain_of(options), assemble_checkpoint(checkpoint, plan, options).graphs
    if one_of_a_kind:
        graphs = {graph.name: graph for graph in {graph.factory: graph for graph in graphs.values()}.values()}
    sources = engine_weights(checkpoint, False, tools.precision) | preview_weights(checkpoint)
    engines = EngineFactory(tools, EngineCache(cache), sources).make(graphs, done=lambda _: None)
    libraries = {ProgramFile.from_bytes(built.engine.engine).packed for built in engines.values()}
    return engines, len(libraries)


def architectures(engine: BuiltEngine) -> set[int]:
    """Generations of the machine code for GPUs in a library, 90 say: each lies there as an ELF file of its own."""
    library, found, at = ProgramFile.from_bytes(engine.engine.engine).library, set(), 0
    while (at := library.find(ELF, at + 1)) > 0:
        if int.from_bytes(library[at + 18 : at + 20], "little") == CUDA_MACHINE:
            flags = int.from_bytes(library[at + 48 : at + 52], "little")
            found.add((flags >> 8) & 0xFF if flags & 0xFF in (0, 2, 4) else flags & 0xFF)
    return found


@pytest.mark.parametrize("family", models.SMALL)
def test_programs_of_a_small_model(torch_of_cuda, family: str, capability: str, program_cache: Path, record_property):
    engines, programs = compiled(models.SMALL[family](), models.options(capability), program_cache)
    record_property("programs", programs)
    assert len(engines) > programs > 5
    generations = {generation for built in engines.values() for generation in architectures(built)}
    assert generations == {int(capability.removeprefix("sm"))}


@pytest.mark.slow
def test_programs_of_infinity_2b(torch_of_cuda, capability: str, program_cache: Path, record_property):
    engines, programs = compiled(models.infinity_2b(), models.options(capability), program_cache)
    record_property("programs", programs)
    assert {name.partition("-")[0] for name in engines} >= {
        "qkv",
        "attn_mlp",
        "sampling_head",
        "decoder",
        "conditioning",
    }
    largest = max(len(ProgramFile.from_bytes(built.engine.engine).packed) for built in engines.values())
    assert largest < 8 << 20, "a program holds no weights"


def test_the_same_library_comes_from_every_build(torch_of_cuda, program_cache: Path, tmp_path: Path):
    """Nothing is tried out on a GPU, so nothing depends on one: neither on an earlier run nor on its cache."""
    made = (compiled(models.infinity(), models.options("sm90"), cache, True) for cache in (program_cache, tmp_path))
    first, second = (engines for engines, _ in made)
    differing = [name for name, built in first.items() if built.engine.engine != second[name].engine.engine]
    assert differing == []


def test_engines_are_loaded_on_a_gpu_of_their_generation_alone(torch_of_cuda, monkeypatch: pytest.MonkeyPatch):
    from fastvar.engines.registry import get_backend

    backend = get_backend("aotinductor", target="cuda-sm90")
    spec = EngineSpec("qkv", "", "", 0, (), (), {}, "aotinductor", "cuda-sm90", backend.version())
    with pytest.raises(BackendError, match="torch finds no GPU"):
        backend.check(spec)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 6))
    with pytest.raises(BackendError, match=r"built for cuda-sm90, this GPU is cuda-sm86\nfix: .*--target cuda-sm86"):
        backend.check(spec)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    backend.check(spec)
