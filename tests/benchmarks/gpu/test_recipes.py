"""What a day builds, and what of it is packed beforehand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.gpu import pack as packing
from benchmarks.gpu.identity import Identity
from benchmarks.gpu.journal import Journal, Measuring
from benchmarks.gpu.measured.bundles import build_all
from benchmarks.gpu.pack import keep_engines, pack
from benchmarks.gpu.recipes import BATCHED, BATCHES, FIRST, TOLD, WITH_CUDNN, Recipe, recipes, retargeted
from benchmarks.gpu.sections import Context
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.cache.engine_cache import CachedEngine, EngineCache
from fastvar.errors import BuildError
from fastvar.export import rebuild as rebuilding


def test_weights_are_made_before_they_are_taken_over():
    found = list(recipes("infinity_2b", "sm90"))
    names = [recipe.name for recipe in found]
    assert len(set(names)) == len(names)
    assert names[0] == FIRST
    for position, recipe in enumerate(found):
        assert not recipe.like or recipe.like in names[:position]
    of_model = [recipe for recipe in found if recipe.source == "infinity_2b"]
    assert [bool(recipe.like) for recipe in of_model] == [False, *[True] * 5], "random weights are made once"
    (batched,) = [recipe for recipe in found if recipe.name == BATCHED]
    assert (batched.like, batched.batch) == (FIRST, BATCHES)
    assert all(recipe.batch == (1,) for recipe in found if recipe is not batched)
    targets = {recipe.name: recipe.target for recipe in found}
    assert (targets[FIRST], targets[WITH_CUDNN], targets["demo-cpu"]) == ("cuda-sm90", "cuda-sm90-cudnn", None)


def test_a_bundle_that_is_rebuilt_with_another_attention(tiny_bundle: Path):
    """Its target is that of its engines, all of them."""
    found = retargeted(Bundle.open(tiny_bundle), "cuda-sm90-cudnn").manifest
    assert found.target == "cuda-sm90-cudnn"
    assert {spec.target for spec in found.engines.values()} == {found.target}


def test_a_recipe_of_several_batches(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Built, packed, and taken over from another bundle with the same passes."""
    recipe = Recipe("of-many", "tiny", "onnxruntime", None, "fp32", "256x256", "dense", like="first", batch=(1, 4, 8))
    _, _, options, _ = recipe.parts()
    assert options.batches == ((2, 1), (2, 4), (2, 8))
    asked: list[object] = []

    def rebuilt(source: Bundle, out: Path, **given: object) -> SimpleNamespace:
        asked.append((source.path, out, given["batch"], given["size"]))
        return SimpleNamespace(**dict.fromkeys(TOLD, 0))

    monkeypatch.setattr(rebuilding, "rebuild", rebuilt)
    (tmp_path / "first").symlink_to(tiny_bundle)
    recipe.make(tmp_path)
    assert asked == [(tmp_path / "first", tmp_path / "of-many", (1, 4, 8), "256x256")]


@pytest.fixture
def wanted() -> list[Recipe]:
    """A tiny model on the CPU, and another policy of it."""
    first = Recipe("first", "tiny", "onnxruntime", None, "fp32", "256x256", "dense")
    return [Recipe("second", "tiny", "onnxruntime", None, "fp32", "256x256", "fastvar", like="first"), first]


@pytest.mark.slow
def test_bundles_of_one_model_share_its_weights(wanted: list[Recipe], tmp_path: Path, engine_cache: Path, monkeypatch):
    """A line each; a bundle that is gone is built again, one that is there is not."""
    monkeypatch.setenv("FASTVAR_CACHE", str(engine_cache))
    log = Measuring(Journal(tmp_path / "journal.jsonl"), "build", "d", [])
    context = Context(tmp_path, Identity("a GPU", "sm90", "", False, "tiny"), log)
    build_all(context, wanted, tmp_path / "bundles")
    assert not log.failed, log.journal.lines()
    first, second = (Bundle.open(tmp_path / "bundles" / name) for name in ("first", "second"))
    assert first.weights.path.stat().st_ino == second.weights.path.stat().st_ino, "one file"
    assert (first.manifest.plan.policy.name, second.manifest.plan.policy.name) == ("dense", "fastvar")
    (tmp_path / "bundles" / "second" / "manifest.json").unlink()
    build_all(context, wanted, tmp_path / "bundles")
    assert [line["name"] for line in log.journal.lines()] == ["first", "second", "second"]


@pytest.mark.slow
def test_what_is_packed_is_all_that_a_build_needs(wanted: list[Recipe], tmp_path: Path, monkeypatch):
    """Engines alone, without a bundle or weights; whoever builds with them traces and compiles nothing."""
    said: list[str] = []
    size = pack(wanted, tmp_path / "cache", said.append)
    assert size == sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert "first: " in said[1]
    monkeypatch.setenv("FASTVAR_CACHE", str(tmp_path / "cache"))
    made = wanted[1].make(tmp_path)
    assert (made["graphs_traced"], made["compile_seconds"]) == (0, 0)
    monkeypatch.setattr(packing, "MOST_BYTES", size - 1)
    with pytest.raises(BuildError, match=f"at most {size - 1}"):
        pack(wanted, tmp_path / "cache", said.append)


def test_traced_programs_are_left_out(tmp_path: Path):
    cache = EngineCache(tmp_path / "all")
    cache.put("a" * 64, CachedEngine(b"PK\x03\x04 a program", (), ()))
    cache.put("b" * 64, CachedEngine(b"an engine", (), ()))
    keep_engines(cache.folder, tmp_path / "kept")
    kept = EngineCache(tmp_path / "kept")
    assert kept.get("a" * 64) is None
    assert kept.get("b" * 64).engine == b"an engine"
    keep_engines(cache.folder, tmp_path / "kept")
    assert len(list((tmp_path / "kept").iterdir())) == 2, "made anew, not added to"
