"""A bundle with another transformer's weights is the bundle that a build of that transformer gives."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastvar
from fastvar import Pipeline
from fastvar.core.precision import Precision
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.weight_file import WeightFile, write_weights
from fastvar.errors import BundleError, CheckpointError, NumericsError
from fastvar.export import new_weights
from fastvar.export.checkpoints.checkpoint import load_checkpoint, transformer_shapes
from fastvar.export.checkpoints.random_weights import RandomWeights
from fastvar.export.checkpoints.weight_sources import engine_weights, preview_weights, write_sources
from fastvar.export.new_weights import replace_weights
from tests.models import tiny_layouts as tiny


@pytest.fixture
def finetune(tiny_checkpoint_folder: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with other weights in its transformer, as the training program leaves it."""
    folder = tmp_path / "finetune"
    shutil.copytree(tiny_checkpoint_folder, folder)
    config = load_checkpoint(folder).transformer
    state = dict(RandomWeights(transformer_shapes(config), seed=5))
    torch.save({"trainer": {"gpt_ema_fsdp": state, "gpt_fsdp": {}}}, folder / "transformer.pth")
    return folder


def image(bundle: Path, **inputs) -> np.ndarray:
    with Pipeline.load(bundle) as pipe:
        return np.asarray(pipe(seed=3, **(inputs or {"prompt": "a red circle"})).images[0])


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"weights": "int8"}], ids=["fp32", "fp16", "int8"])
def test_it_draws_what_a_build_of_the_fine_tune_draws(
    tiny_checkpoint, finetune, tiny_policy, engine_cache, tmp_path, options
):
    made = {"size": "256x256", "policy": str(tiny_policy), "cache": engine_cache, **options}
    base, direct, out = tmp_path / "base", tmp_path / "direct", tmp_path / "swapped"
    fastvar.build(tiny_checkpoint, out=base, **made)
    fastvar.build(finetune, out=direct, **made)
    report = replace_weights(base, out, transformer=finetune / "transformer.pth")
    assert np.array_equal(image(out), image(direct))
    assert not np.array_equal(image(out), image(base))
    new, built, old = (Bundle.open(path, verify="all") for path in (out, direct, base))
    assert new.manifest.weights == built.manifest.weights  # digest and size
    assert new.manifest.weights.sha256 != old.manifest.weights.sha256
    assert {e.sha256 for e in new.manifest.engines.values()} == {e.sha256 for e in old.manifest.engines.values()}
    assert (report.graphs_traced, report.engines_copied) == (0, len(old.manifest.engines))


def test_the_manifest_says_whose_weights_they_are(tiny_bundle, finetune, tmp_path):
    report = replace_weights(tiny_bundle, tmp_path / "b", transformer=finetune / "transformer.pth", name="mine")
    manifest, old = Bundle.open(tmp_path / "b").manifest, Bundle.open(tiny_bundle).manifest
    assert manifest.model == "mine"
    assert manifest.origin == report.origin
    assert manifest.origin[0] == "transformer: transformer.pth (trainer > gpt_ema_fsdp)"
    assert manifest.origin[-1] == f"all else: the bundle of tiny, checkpoint {old.checkpoint_digest[:12]}"
    assert manifest.checkpoint_digest != old.checkpoint_digest
    replace_weights(tiny_bundle, tmp_path / "c", transformer=finetune / "transformer.pth")
    assert Bundle.open(tmp_path / "c").manifest.model == "transformer"
    replace_weights(tmp_path / "b", tmp_path / "d", transformer=finetune)
    again = Bundle.open(tmp_path / "d").manifest
    assert (again.model, again.origin) == ("finetune", manifest.origin)


def test_a_bundle_can_take_them_in_its_place(tiny_bundle, finetune, tmp_path):
    place = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, place)
    replace_weights(place, place, transformer=finetune)
    replace_weights(tiny_bundle, tmp_path / "other", transformer=finetune)
    assert Bundle.open(place, verify="all").manifest.weights == Bundle.open(tmp_path / "other").manifest.weights
    assert np.array_equal(image(place), image(tmp_path / "other"))


def test_what_comes_of_the_image_tokenizer_stays(engine_cache, tmp_path):
    """A codebook is bound to the transformer's graphs, and is no part of the transformer."""
    first, second = (tiny.var(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2)))
    made = {"policy": "dense", "guidance": "on", "cache": engine_cache}
    fastvar.build(first, out=tmp_path / "base", **made)
    fastvar.build(second, out=tmp_path / "direct", **made)
    replace_weights(tmp_path / "base", tmp_path / "out", transformer=second / "var_d16.pth")
    assert np.array_equal(image(tmp_path / "out", class_labels=1), image(tmp_path / "direct", class_labels=1))


def refused(bundle, out: Path, transformer: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        replace_weights(bundle, out, transformer=transformer)
    assert not out.exists()


def test_another_shape_is_refused(tiny_bundle, tmp_path):
    config = replace(Bundle.open(tiny_bundle).manifest.transformer, mlp_width=256)
    save_file(dict(RandomWeights(transformer_shapes(config))), tmp_path / "wide.safetensors")
    match = r"cannot take the place of the transformer of tiny: .*of another shape: .*fc1\.bias \[256\]"
    refused(tiny_bundle, tmp_path / "b", tmp_path / "wide.safetensors", CheckpointError, match)


def test_another_family_and_what_is_not_finite_are_refused(tiny_bundle, finetune, tmp_path):
    other = tiny.var(tmp_path / "var") / "var_d16.pth"
    refused(tiny_bundle, tmp_path / "b", other, CheckpointError, "cannot take the place")
    state = torch.load(finetune / "transformer.pth")["trainer"]["gpt_ema_fsdp"]
    state["head.weight"][0, 0] = float("inf")
    torch.save(state, tmp_path / "bad.pth")
    refused(tiny_bundle, tmp_path / "b", tmp_path / "bad.pth", NumericsError, r"head\.weight")


def test_a_bundle_of_another_version_is_refused(tiny_bundle, finetune, tmp_path):
    bundle = Bundle.open(tiny_bundle)
    wider = replace(bundle.manifest, precision=replace(bundle.manifest.precision, compute="float16"))
    refused(replace(bundle, manifest=wider), tmp_path / "b", finetune, BundleError, "not as this version makes them")


def test_on_the_command_line(run, tiny_bundle, finetune, tmp_path):
    code, out, err = run("build", "--from-bundle", tiny_bundle, "--weights-from", finetune, "--out", "b")
    assert (code, err) == (0, "")
    assert "transformer: transformer.pth (trainer > gpt_ema_fsdp)" in out
    assert json.loads(run("inspect", "b", "--json")[1])["model"] == "finetune"
    for given, message in {
        ("--weights-from", "f.pth"): "--weights-from goes with --from-bundle",
        ("--from-bundle", tiny_bundle, "--weights-from", finetune, "--policy", "dense"): "not go with --policy",
        ("--from-bundle", tiny_bundle, "--weights-from", "missing.pth"): "no checkpoint missing.pth",
    }.items():
        code, _, err = run("build", *given, "--out", "c")
        assert code == 2
        assert message in err
        assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "precision",
    [Precision("bfloat16", "int8", "int8"), Precision("float16", "float8_e4m3fn"), Precision("bfloat16")],
    ids=lambda precision: precision.label,
)
def test_stored_weights_are_derived_as_a_build_derives_them(
    tiny_checkpoint, tiny_bundle, finetune, tmp_path, precision
):
    """In precisions whose engines take minutes to compile: the weight files alone, and they are all that differs."""
    checkpoints = {"base": tiny_checkpoint, "direct": load_checkpoint(finetune)}
    for name, checkpoint in checkpoints.items():
        sources = engine_weights(checkpoint, False, precision) | preview_weights(checkpoint)
        write_sources(tmp_path / name, sources, precision)
    old = replace(Bundle.open(tiny_bundle).manifest, precision=precision)
    tensors = new_weights._Tensors(WeightFile(tmp_path / "base"), old, checkpoints["direct"].transformer_weights)
    write_weights(tmp_path / "swapped", tensors.specs, tensors.fetch)
    assert (tmp_path / "swapped").read_bytes() == (tmp_path / "direct").read_bytes()
    assert (tmp_path / "swapped").read_bytes() != (tmp_path / "base").read_bytes()
