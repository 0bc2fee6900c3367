"""A bundle compiled for a GPU in 16 bits, drawn on the CPU through its modules: all but the compiler's work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvar.core.dtypes import element_type
from fastvar.core.policy import ScaleRule
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.weight_file import WeightFile
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.export.module_backend import ModuleBackend
from fastvar.export.options import BuildOptions
from fastvar.export.toolchain import make_toolchain
from fastvar.families.infinity import ImageTokenizerConfig
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from tests.models import tiny_models as tiny

# A token's keys take 256 bytes: TensorRT wants every scale's at a multiple of that.
CONFIG = replace(tiny.CONFIG, width=64, heads=2)
# A dense scale, the cached one, one that is dense behind it, and a pruned one.
SKIPPED = dict.fromkeys((1, 3, 4), ScaleRule(skip=True))
PLAN = tiny.plan(replace(tiny.POLICY, rules={**SKIPPED, 6: ScaleRule(0.25)}))
IMAGES = ImageTokenizerConfig(bits=6, base_channels=24, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=0)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    made = random_checkpoint_for(CONFIG, IMAGES, name="tiny")
    return replace(made, transformer_weights=dict(tiny.model(CONFIG).state_dict()))


@pytest.fixture(scope="module", params=[None, "fp8"])
def bundle(request, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> Bundle:
    pytest.importorskip("tensorrt_rtx")
    toolchain = make_toolchain("tensorrt-rtx", "sm89", weights=request.param)
    out = tmp_path_factory.mktemp("rtx") / "bundle"
    build_bundle(checkpoint, PLAN, out, BuildOptions(guidance="on"), toolchain=toolchain, cache=engine_cache)
    return Bundle.open(out)


def test_16_bit_bundles_draw_close_to_the_fp32_reference(bundle: Bundle):
    """With the reference's bits forced, so that no rounding sends the two different ways."""
    model, (features, mask) = tiny.model(CONFIG), tiny.text(CONFIG, lengths=(5, 8))
    expected = list(generate_scales(model, features, mask, PLAN, tiny.noise, Sampling(guidance_scale=3.0, tau=0.7)))
    workspace = Session(bundle, backend=ModuleBackend(bundle.manifest)).workspace(2)
    workspace.set_features(features[0].numpy(), features[1].numpy(), (5, 8))
    bits = {trace.step.index: trace.bits for trace in expected}
    steps = workspace.run_scales(lambda i, _: torch.where(bits[i], -1.0, 2.0).numpy(), SamplingSettings(3.0, 0.7, 0.97))
    limit = 0.2 if bundle.manifest.precision.weights == "float8_e4m3fn" else 0.06
    for (calls, _), trace in zip(steps, expected, strict=True):
        logits = torch.from_numpy(workspace.read(calls.sampling_head, "logits"))
        assert 1e-5 < (logits - trace.logits).norm() / trace.logits.norm() < limit
        np.testing.assert_allclose(workspace.summed_codes(calls), trace.summed_codes[0], atol=1e-5)


def test_weights_are_stored_in_what_they_are_used_in(bundle: Bundle):
    stored, precision = WeightFile(bundle.path / bundle.manifest.weights.file), bundle.manifest.precision
    layer = "transformer.blocks.1."
    assert stored.dtype(layer + "ffn.fc1.weight") == (precision.weights or "bfloat16")
    assert stored.dtype(layer + "ffn.fc1.bias") == "bfloat16"
    assert stored.dtype(layer + "ca_norm.weight") == "float32"
    assert (layer + "ffn.fc1.weight.scale" in stored) == bool(precision.weights)
    assert stored.dtype("transformer.cfg_uncond") == "float32", "the runtime reads it"
    for spec in bundle.manifest.engines.values():
        for tensor in spec.inputs:
            if tensor.name in spec.weights:
                name = spec.weights[tensor.name].format(layer=2)
                assert (stored.dtype(name), stored.shape(name)) == (element_type(tensor.dtype).name, tensor.shape)
