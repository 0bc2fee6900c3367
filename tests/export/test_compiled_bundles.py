"""Whole bundles that AOTInductor compiles for this CPU: they edit images, and take the weights of a fine-tune."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar import Pipeline
from fastvar.engines.aotinductor.native import AVX512_BF16, AVX512_VNNI, cpu_lacks
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.checkpoint import Checkpoint, transformer_shapes
from fastvar.export.checkpoints.random_weights import RandomWeights
from fastvar.export.conversion.convert import convert
from fastvar.export.new_weights import replace_weights
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import make_toolchain
from fastvar.runtime.editing.edits import inpainting
from fastvar.runtime.editing.source_image import read_mask
from tests.models import tiny_var

pytestmark = pytest.mark.slow
Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path, engine_cache: Path) -> Build:
    """A bundle of a checkpoint, with guidance alone."""

    def made(
        name: str, checkpoint: Checkpoint, *, precision: str, weights: str = "", with_encoder: bool = False
    ) -> Path:
        toolchain = make_toolchain("aotinductor", precision=precision, weights=weights or None)
        options = BuildOptions(guidance="on", with_encoder=with_encoder)
        build_bundle(checkpoint, tiny_var.plan(), tmp_path / name, options, toolchain=toolchain, cache=engine_cache)
        return tmp_path / name

    return made


@pytest.fixture
def picture() -> Image.Image:
    """Smooth random colours."""
    levels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    return Image.fromarray(levels).resize((128, 128), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bundle_of_classes_edits_images(build: Build, var_editing_bundle: Path, picture, precision: str):
    """As onnxruntime does in fp32: what the image encoder gives, and so all that is kept, is alike."""
    mask = np.zeros((128, 128), bool)
    mask[83:121, 70:108] = True
    bundle = build("bundle", tiny_var.checkpoint(), precision=precision, with_encoder=True)
    with Pipeline.load(bundle, threads=1) as pipe, Pipeline.load(var_editing_bundle, threads=1) as reference:
        edit = inpainting(picture, read_mask(mask), pipe.manifest.plan, fit="exact", composite=False)
        found, expected = (one._session.workspace(2).encode_image(edit.pixels) for one in (pipe, reference))
        off = np.abs(found - expected).mean() / expected.std()
        assert off < (0.03 if precision == "bf16" else 1e-4), off
        whole = [np.asarray(pipe.upscale(picture, class_labels=3, keep_scales=5, consistency=False).images[0], float)]
        drawn = [
            np.asarray(pipe.inpaint(picture, mask, class_labels=label, seed=4, composite=False).images[0], float)
            for label in (3, 3, 7)
        ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - whole[0])[mask].mean() > 10, "inside it is drawn anew"
    assert np.abs(drawn[0] - drawn[2])[mask].mean() > 1, "of another class otherwise"


def test_a_fine_tune_in_8_bits_draws_what_a_build_of_it_draws(build: Build, tmp_path: Path):
    """Converted from a training checkpoint; weights and activations are int8."""
    if lacking := cpu_lacks((*AVX512_BF16, *AVX512_VNNI)):
        pytest.skip(f"this CPU lacks {', '.join(lacking)}")
    base = tiny_var.checkpoint()
    state = dict(RandomWeights(transformer_shapes(tiny_var.CONFIG), 5, torch.float32))
    torch.save({"trainer": {"var_wo_ddp": state}}, tmp_path / "ar-ckpt.pth")
    (tmp_path / "config.json").write_text(json.dumps({"heads": 4, "scales": list(tiny_var.CONFIG.scales)}))
    report = convert(tmp_path / "ar-ckpt.pth", tmp_path / "tuned.safetensors")
    assert report.origin == "ar-ckpt.pth (trainer > var_wo_ddp)"
    bundles = {
        name: build(name, checkpoint, precision="bf16", weights="w8a8")
        for name, checkpoint in (("base", base), ("direct", replace(base, transformer_weights=state)))
    }
    replace_weights(bundles["base"], tmp_path / "swapped", transformer=tmp_path / "tuned.safetensors")
    images = {}
    for name in (*bundles, "swapped"):
        with Pipeline.load(tmp_path / name, threads=1) as pipe:
            assert pipe.manifest.precision.label == "bf16 with int8 weights and activations"
            images[name] = np.asarray(pipe(class_labels=[3, 5], seed=7).images)
    np.testing.assert_array_equal(images["swapped"], images["direct"])
    assert (images["swapped"] != images["base"]).any()
    digests = [Bundle.open(tmp_path / name).manifest.weights.sha256 for name in ("swapped", "direct")]
    assert digests[0] == digests[1]
