"""The image encoder as an engine, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastvar.core.precision import parse_precision
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.models.codebook.steps import VqImageEncoder
from fastvar.export.models.common.weights import Role
from fastvar.export.models.var.steps import VarAdapter
from fastvar.export.rebuild import rebuild
from tests.models import tiny_var
from tests.parity.image_tokenizer import CoderEngine

GRID = (8, 8)


def photo() -> torch.Tensor:
    """Every level of red and green, [1, 3, 128, 128] in [-1, 1]."""
    levels = np.random.default_rng(4).integers(0, 256, (20, 20, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(levels).resize((128, 128), Image.Resampling.BICUBIC))
    return torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("aotinductor", marks=pytest.mark.slow)])
def test_an_engine_makes_the_latent_of_torch(backend: str):
    tokenizer, image = tiny_var.tokenizer(), photo()
    encode = CoderEngine(backend, VqImageEncoder(tiny_var.IMAGES, GRID), "", dict(tokenizer.state_dict()))
    expected = tokenizer.encode(image)
    assert expected.std() > 0.5
    torch.testing.assert_close(encode(image), expected, atol=1e-4, rtol=0)


def test_it_is_in_the_bundle_with_all_its_weights(var_editing_bundle):
    bundle = Bundle.open(var_editing_bundle)
    encoder = bundle.manifest.engines[bundle.manifest.encoder]
    assert encoder.tensor("image").shape == (1, 3, 128, 128)
    assert encoder.tensor("latent").shape == (1, 8, *GRID)
    state = tiny_var.tokenizer().state_dict()
    read = {name for name in state if name.startswith(("encoder.", "quant_conv."))}
    assert {name.removeprefix("image_tokenizer.") for name in encoder.weights.values()} == read
    for name in read:
        np.testing.assert_array_equal(bundle.weights[f"image_tokenizer.{name}"], state[name].numpy())


def test_a_rebuilt_bundle_has_it_too(var_editing_bundle, engine_cache, tmp_path):
    report = rebuild(var_editing_bundle, tmp_path / "out", policy=tiny_var.PRUNED, cache=engine_cache)
    assert report.engines_copied == 2, "encoder and decoder"
    old, new = (Bundle.open(path).manifest for path in (var_editing_bundle, tmp_path / "out"))
    assert new.encoder == old.encoder == "encoder-8x8"
    assert new.engines[new.encoder] == old.engines[old.encoder]


def test_the_latent_is_fp32_whatever_is_computed_in():
    """What it is compared with is; in 16 bits other codes would be nearest."""
    adapter, half = VarAdapter(), parse_precision("bf16", None, default="float32")
    assert adapter.image_role("quant_conv.weight") is Role.FP32
    assert adapter.image_role("encoder.conv_out.bias") is Role.FP32
    for name in ("encoder.conv_in.weight", "post_quant_conv.weight"):
        assert adapter.image_role(name).dtype(half) == "bfloat16"
    assert VqImageEncoder(tiny_var.IMAGES, GRID).output_shapes()["latent"] == (1, 8, *GRID)
