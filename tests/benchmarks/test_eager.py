"""The eager baseline: the reference without what serves comparing only; 16 bits are where they may be."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import eager
from benchmarks.eager import EagerContender, EagerModel
from fastvar.core.plan import GenerationPlan
from fastvar.errors import BackendError
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.export.models.infinity.tokenizer import Decoder
from fastvar.export.models.transformer import pruning
from fastvar.families.infinity import ImageTokenizerConfig
from tests.models import tiny_models
from tests.models.tiny_models import CONFIG, POLICY, dense_plan, noise, plan, without_guidance

IMAGES = ImageTokenizerConfig(
    bits=CONFIG.bits, base_channels=24, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=1
)
SAMPLING = Sampling(guidance_scale=2.0, tau=0.7, top_p=0.9)
TEXT = np.random.default_rng(0).standard_normal((2, 5, CONFIG.text_width), dtype=np.float32)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return random_checkpoint_for(CONFIG, IMAGES, seed=3, dtype=torch.float32)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> EagerModel:
    return EagerModel(checkpoint, "fp32")


def host_noise(index: int, shape: tuple[int, ...]) -> np.ndarray:
    return noise(index, (shape[0], shape[1])).numpy()


@pytest.mark.parametrize("made", [plan(), dense_plan(), plan(without_guidance(POLICY, 5))], ids=lambda p: p.policy.name)
def test_it_draws_what_the_reference_draws(checkpoint: Checkpoint, model: EagerModel, made: GenerationPlan):
    reference = InfinityTransformer(CONFIG).eval().requires_grad_(False)
    reference.load_state_dict(dict(checkpoint.transformer_weights))
    mask = torch.ones(TEXT.shape[:2], dtype=torch.bool)
    traces = list(generate_scales(reference, torch.from_numpy(TEXT), mask, made, noise, SAMPLING))
    contender = EagerContender(model, made, TEXT, SAMPLING)
    assert contender.text() > 0
    found = contender.logits(host_noise)
    assert len(found) == len(traces) == len(made.steps)
    for logits, trace in zip(found, traces, strict=True):
        np.testing.assert_allclose(logits, trace.logits.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(contender.summed_codes(), traces[-1].summed_codes.numpy())
    assert len(contender.scales(host_noise)) == len(made.steps)


def test_the_decoder_is_that_of_the_checkpoint(checkpoint: Checkpoint, model: EagerModel, monkeypatch):
    decoder = Decoder(IMAGES).eval()
    decoder.load_state_dict({n: checkpoint.image_tokenizer_weights[f"decoder.{n}"] for n in decoder.state_dict()})
    contender = EagerContender(model, plan(), TEXT, SAMPLING)
    contender.text()
    contender.scales(host_noise)
    seen: list[Tensor] = []
    run = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda codes: seen.append(run(codes)) or seen[-1])
    assert contender.decode() > 0
    with torch.no_grad():
        torch.testing.assert_close(seen[0], decoder(torch.from_numpy(contender.summed_codes())))


def test_selection_and_residual_stream_are_fp32_under_autocast(checkpoint: Checkpoint, monkeypatch):
    """The block's products are not: what it caches as values is bfloat16."""
    scored: list[torch.dtype] = []
    states: list[Any] = []
    select, run_block = pruning.select, eager.run_block

    def seen_select(x: Tensor, count: int) -> Tensor:
        scored.append(x.dtype)
        return select(x, count)

    def seen_block(block: Any, x: Tensor, conditioning: Any, run: Any, state: Any, prunes: bool) -> Tensor:
        assert x.dtype is torch.float32
        states.append(state)
        return run_block(block, x, conditioning, run, state, prunes)

    monkeypatch.setattr(pruning, "select", seen_select)
    monkeypatch.setattr(eager, "run_block", seen_block)
    contender = EagerContender(EagerModel(checkpoint, "bf16"), plan(), TEXT, SAMPLING)
    contender.text()
    logits = contender.logits(host_noise)
    assert len(scored) == 2 * 2 * 3, "two pruned scales, two pruned layers, three sub-layers"
    assert set(scored) == {torch.float32}
    assert {state.values.dtype for state in states} == {torch.bfloat16}
    assert all(np.isfinite(scale).all() for scale in logits)


def test_bf16_stores_the_matrices_of_the_blocks_and_nothing_else(checkpoint: Checkpoint):
    stored = EagerModel(checkpoint, "bf16").transformer.state_dict()
    half = {name for name, weight in stored.items() if weight.dtype is torch.bfloat16}
    assert {name.split(".", 2)[2] for name in half} == {
        f"{part}.weight" for part in ("sa.mat_qkv", "sa.proj", "ca.mat_q", "ca.mat_kv", "ca.proj", "ffn.fc1", "ffn.fc2")
    }
    assert len(half) == 7 * CONFIG.depth
    assert {weight.dtype for name, weight in stored.items() if name not in half} == {torch.float32}


def test_no_gpu_is_an_error(checkpoint: Checkpoint):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match="torch sees no GPU"):
        EagerModel(checkpoint, "bf16", "cuda")


def test_peaks_are_those_of_the_machine():
    from benchmarks.machine_peak import copied_bytes_per_s, gemm_flop_per_s

    for precision in ("fp32", "bf16", "int8"):
        assert 1e6 < gemm_flop_per_s(precision, "cpu", side=64) < 1e14
    assert 1e6 < copied_bytes_per_s("cpu", size=1 << 16) < 1e13


def test_text_without_padding_needs_no_mask():
    """A mask that hides nothing gives the same."""
    model = tiny_models.model()
    features, _ = tiny_models.text(lengths=(8, 8))
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    masked, bare = model.conditioning(features, mask), model.conditioning(features, None)
    torch.testing.assert_close(bare.sos, masked.sos)
    tokens, block = torch.randn(2, 6, CONFIG.width), model.layers[0]
    keys = block.ca.text_kv(bare.text)
    torch.testing.assert_close(block.cross_attention(tokens, *keys, None), block.cross_attention(tokens, *keys, mask))
