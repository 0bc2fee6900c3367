"""A rebuilt bundle is, byte for byte, the one that the checkpoint would have given."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fastvar
from fastvar import Pipeline
from fastvar.engines.aotinductor.backend import AotInductorBackend
from fastvar.engines.base import ONNX, PROGRAM
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import SamplingDefaults
from fastvar.errors import BackendError, BuildError, BundleError, PlanError
from fastvar.export import rebuild as rebuilding
from fastvar.export.rebuild import rebuild
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity_presets import schedule_for
from tests.conftest import TINY_POLICY

OTHER_POLICY = TINY_POLICY.replace("keep = 0.5", "keep = 0.25")
# Everything that a rebuild must take over, away from its default.
OWN = {"guidance": "on", "text_length": 8, "sampling": SamplingDefaults(2.0, 0.7, 0.9)}


@pytest.fixture(scope="module")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("policy") / "other.toml"
    path.write_text(OTHER_POLICY)
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        pytest.param("256x256", {**OWN, "weights": "int8", "with_encoder": True}, marks=pytest.mark.slow),
        ("240x320", {"guidance": "off"}),
    ],
    ids=["policy", "size"],
)
def test_it_is_the_bundle_that_the_checkpoint_gives(
    tiny_checkpoint, tiny_policy, other_policy, engine_cache, tmp_path: Path, size: str, options: dict
):
    source, direct, out = tmp_path / "source", tmp_path / "direct", tmp_path / "rebuilt"
    fastvar.build(tiny_checkpoint, size="256x256", policy=str(tiny_policy), out=source, cache=engine_cache, **options)
    fastvar.build(tiny_checkpoint, size=size, policy=other_policy, out=direct, cache=engine_cache, **options)
    report = rebuild(source, out, policy=other_policy, size=size, cache=engine_cache)
    assert contents(out) == contents(direct)
    assert report.weights_linked
    assert (out / "weights.safetensors").samefile(source / "weights.safetensors")
    copied = 3 if size == "256x256" else 1  # text encoder, decoder, encoder; of another size the first alone
    assert (report.engines_copied, report.graphs_traced) == (copied, 0)


def test_another_batch(tiny_checkpoint, tiny_bundle, batched_bundle, tiny_policy, engine_cache, tmp_path: Path):
    """One image a pass, then up to four, then one again: each the bundle that the checkpoint gives."""
    rebuild(tiny_bundle, tmp_path / "more", policy=str(tiny_policy), batch=(4, 2), cache=engine_cache)
    more = Bundle.open(tmp_path / "more", verify="all").manifest
    assert [own.batch for own in more.sets] == [(2, 1), (1, 1), (2, 2), (1, 2), (2, 4), (1, 4)]
    found = Bundle.open(batched_bundle).manifest
    assert more.sets == found.sets, "as built at once"
    assert {n: e.sha256 for n, e in more.engines.items()} == {n: found.engines[n].sha256 for n in more.engines}
    rebuild(tmp_path / "more", tmp_path / "same", policy=str(tiny_policy), cache=engine_cache)
    assert contents(tmp_path / "same") == contents(tmp_path / "more"), "its own numbers, where none are given"
    rebuild(tmp_path / "more", tmp_path / "one", policy=str(tiny_policy), batch=(1,), cache=engine_cache)
    assert contents(tmp_path / "one") == contents(tiny_bundle)


@pytest.mark.parametrize("batch", [(0,), (65,), (1, "2"), 2.0, (True,)])
def test_a_batch_that_is_none(tiny_bundle, tiny_policy, tmp_path: Path, batch: object):
    with pytest.raises(BuildError, match=r"batch .* not understood"):
        rebuild(tiny_bundle, tmp_path / "out", policy=str(tiny_policy), batch=batch)
    assert not (tmp_path / "out").exists()


def test_it_draws_the_same_image(tiny_checkpoint, tiny_bundle, other_policy, engine_cache, tmp_path: Path):
    schedule = schedule_for((256, 256))
    rebuild(tiny_bundle, tmp_path / "a", policy=INFINITY.policy(other_policy, schedule, 2), cache=engine_cache)
    fastvar.build(tiny_checkpoint, size="256x256", policy=other_policy, out=tmp_path / "b", cache=engine_cache)
    a, b, old = (Pipeline.load(path)("red", seed=3).images[0] for path in (tmp_path / "a", tmp_path / "b", tiny_bundle))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, old)


def test_a_bundle_can_be_rebuilt_in_its_place(tiny_bundle, other_policy, engine_cache, tmp_path: Path):
    place = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, place)
    weights = (place / "weights.safetensors").stat().st_ino
    rebuild(place, place, policy=other_policy, cache=engine_cache)
    assert Bundle.open(place, verify="all").manifest.plan.policy.name == "other"
    assert (place / "weights.safetensors").stat().st_ino == weights


def test_without_links_it_copies(tiny_bundle, other_policy, engine_cache, tmp_path: Path, monkeypatch):
    def across_file_systems(*_paths: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", across_file_systems)
    report = rebuild(tiny_bundle, tmp_path / "b", policy=other_policy, cache=engine_cache)
    assert not report.weights_linked
    assert not (tmp_path / "b" / "weights.safetensors").samefile(tiny_bundle / "weights.safetensors")
    assert Bundle.open(tmp_path / "b", verify="all").manifest.weights == Bundle.open(tiny_bundle).manifest.weights


def test_weights_behind_a_symbolic_link_are_linked_themselves(tiny_bundle, other_policy, engine_cache, tmp_path: Path):
    """As in a hub cache; links that lead outside a bundle are refused elsewhere."""
    source, blob = tmp_path / "models--o--n" / "snapshots" / "1", tmp_path / "models--o--n" / "blobs" / "weights"
    shutil.copytree(tiny_bundle, source)
    blob.parent.mkdir()
    shutil.move(source / "weights.safetensors", blob)
    (source / "weights.safetensors").symlink_to("../../blobs/weights")
    rebuild(source, tmp_path / "b", policy=other_policy, cache=engine_cache)
    assert not (tmp_path / "b" / "weights.safetensors").is_symlink()
    assert (tmp_path / "b" / "weights.safetensors").samefile(blob)


def refused(bundle: Bundle, out: Path, policy: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        rebuild(bundle, out, policy=policy)
    assert not out.exists()


def test_weights_of_another_shape_are_refused(tiny_bundle, other_policy, tmp_path: Path):
    bundle = Bundle.open(tiny_bundle)
    wider = replace(bundle.manifest, transformer=replace(bundle.manifest.transformer, mlp_width=256))
    refused(replace(bundle, manifest=wider), tmp_path / "b", other_policy, BundleError, r"fc1\.weight' is float32\[128")


def test_weights_that_are_missing_are_refused(tiny_bundle, other_policy, tmp_path: Path):
    bundle = Bundle.open(tiny_bundle)
    deeper = replace(bundle.manifest, transformer=replace(bundle.manifest.transformer, depth=3))
    refused(replace(bundle, manifest=deeper), tmp_path / "b", other_policy, BundleError, r"blocks\.2\..*is missing")


def test_engines_of_a_library_that_is_not_here_are_refused(tiny_bundle, other_policy, tmp_path: Path):
    bundle = Bundle.open(tiny_bundle)
    engines = {name: replace(spec, library_version="999.0.0") for name, spec in bundle.manifest.engines.items()}
    aged = replace(bundle, manifest=replace(bundle.manifest, engines=engines))
    refused(aged, tmp_path / "b", other_policy, BackendError, r"built with onnxruntime 999\.0\.0")


def test_a_schedule_longer_than_the_level_embedding_is_refused(tiny_bundle, tmp_path: Path):
    bundle = Bundle.open(tiny_bundle)
    short = replace(bundle.manifest, transformer=replace(bundle.manifest.transformer, max_scales=7))
    with pytest.raises(PlanError, match="10 scales"):
        rebuild(replace(bundle, manifest=short), tmp_path / "b", policy="dense", size="512x512")


def test_a_damaged_weight_file_is_refused(tiny_bundle, other_policy, tmp_path: Path):
    source = tmp_path / "source"
    shutil.copytree(tiny_bundle, source)
    with (source / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(BundleError, match="damaged"):
        rebuild(source, tmp_path / "b", policy=other_policy)


def test_a_rebuild_goes_the_way_of_its_backend(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    """AOTInductor takes programs, not ONNX."""
    manifest = Bundle.open(tiny_bundle).manifest
    assert rebuilding._toolchain(manifest).via == ONNX
    monkeypatch.setattr(AotInductorBackend, "resolve_target", lambda self, target, precision: target)
    target = "cpu-avx2"
    engines = {n: replace(s, backend="aotinductor", target=target) for n, s in manifest.engines.items()}
    found = rebuilding._toolchain(replace(manifest, engines=engines))
    assert (found.backend.name, found.target, found.via) == ("aotinductor", target, PROGRAM)
