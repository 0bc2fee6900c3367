"""The shipped checkpoint through the real loading code: its chained engines against the torch reference."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fastvar
from fastvar.core.noise import uniform_noise
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.checkpoints.checkpoint import load_checkpoint
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session

CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"
LENGTH = 12


@pytest.mark.slow
def test_chained_engines_equal_the_reference_on_the_trained_model(tmp_path: Path, engine_cache: Path):
    fastvar.build(CHECKPOINT, size="256x256", policy="fastvar", guidance="on", out=tmp_path / "b", cache=engine_cache)
    bundle, checkpoint = Bundle.open(tmp_path / "b"), load_checkpoint(CHECKPOINT)
    model = InfinityTransformer(checkpoint.transformer).eval().requires_grad_(False)
    model.load_state_dict({name: weight.float() for name, weight in checkpoint.transformer_weights.items()})
    workspace = Session(bundle).workspace(2)
    cond = torch.randn(LENGTH, checkpoint.transformer.text_width, generator=torch.manual_seed(0))
    uncond = model.cfg_uncond.data[:LENGTH]
    workspace.set_features(cond.numpy(), uncond.numpy(), (LENGTH, LENGTH))
    expected = generate_scales(
        model,
        torch.stack((cond, uncond)),
        torch.ones(2, LENGTH, dtype=torch.bool),
        bundle.manifest.plan,
        lambda scale, shape: torch.from_numpy(uniform_noise(5, scale, shape)),
        Sampling(guidance_scale=3.0, tau=0.5),
    )
    ran = workspace.run_scales(lambda scale, shape: uniform_noise(5, scale, shape), SamplingSettings(3.0, 0.5, 0.97))
    for (calls, _), trace in zip(ran, expected, strict=True):
        logits = workspace.read(calls.sampling_head, "logits")
        error = np.linalg.norm(logits - trace.logits.numpy()) / np.linalg.norm(trace.logits.numpy())
        assert error < 1e-4, f"scale {calls.step.index}: {error:.1e}"
        assert np.allclose(workspace.summed_codes(calls), trace.summed_codes[0].numpy(), atol=1e-5)
