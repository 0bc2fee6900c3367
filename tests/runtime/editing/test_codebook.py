"""Residual quantisation over a codebook in numpy gives the published codes, and torch's; noise forces them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file  # which knows 8-bit floats

from fastvar.core.noise import GUMBEL, uniform_noise
from fastvar.export.models.codebook.steps import Ranking
from fastvar.export.models.codebook.tokenizer import Quantizer, area_pool
from fastvar.families.codebook import VqTokenizerConfig, phi_index
from fastvar.families.var import SCALES_256
from fastvar.runtime.editing.codebook import Codebook
from fastvar.runtime.editing.given_tokens import GivenCodes

GOLDEN = Path(__file__).parents[2] / "golden/var_tiny"
TINY = VqTokenizerConfig(codes=40, code_channels=6, base_channels=32)


def codebook_of(state: dict[str, np.ndarray]) -> Codebook:
    """From tensors by their official names, without the tokenizer's prefix."""
    phis = {
        i: tuple(state[f"quant_resi.qresi_ls.{i}.{kind}"].astype(np.float64) for kind in ("weight", "bias"))
        for i in range(4)
    }
    return Codebook(state["embedding.weight"].astype(np.float64), phis, 0.5)


def test_codes_and_sum_are_the_published_ones():
    """Every index of every scale."""
    stored = load_torch_file(GOLDEN / "weights_vae.safetensors")
    state = {n.removeprefix("quantize."): t.float().numpy() for n, t in stored.items() if n.startswith("quantize.")}
    recorded = load_file(GOLDEN / "quant_and_teacher.safetensors")
    grids = [((side, side), phi_index(i, len(SCALES_256))) for i, side in enumerate(SCALES_256)]
    codes, total = codebook_of(state).quantize(recorded["f_in"][0], grids)
    assert [len(own) for own in codes] == [side * side for side in SCALES_256]
    np.testing.assert_array_equal(np.concatenate(codes), recorded["idx_cat"][0])
    assert len(np.unique(recorded["idx_cat"])) > 30, "not a few codes alone"
    np.testing.assert_allclose(total, recorded["f_hat_last"][0], atol=5e-6)


@pytest.fixture(scope="module")
def quantizer() -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(TINY).requires_grad_(False)


# Scales by index, and how many there are: some are left out, the last among them.
EXECUTED = {
    "all": ({0: (1, 1), 1: (2, 2), 2: (3, 3), 3: (5, 5), 4: (8, 8)}, (8, 8)),
    "some left out": ({0: (1, 1), 2: (3, 3), 4: (8, 8)}, (8, 8)),
    "the last one left out": ({0: (1, 1), 1: (2, 2), 3: (5, 5)}, (8, 8)),
    "not square": ({0: (1, 1), 1: (2, 3), 2: (4, 6), 4: (7, 9)}, (7, 9)),
}


@pytest.mark.parametrize("name", EXECUTED)
def test_codes_are_torchs(quantizer: Quantizer, name: str):
    executed, full = EXECUTED[name]
    grids = [(size, phi_index(index, 5)) for index, size in executed.items()]
    codebook = codebook_of({n: t.numpy() for n, t in quantizer.state_dict().items()})
    for seed in range(3):
        latent = np.random.default_rng(seed).normal(0.1, 1.5, (6, *full)).astype(np.float32)
        codes, total = codebook.quantize(latent, grids)
        expected, residual = torch.zeros(1, 6, *full), torch.from_numpy(latent)[None]
        for own, (index, size) in zip(codes, executed.items(), strict=True):
            token_map = quantizer.nearest(area_pool(residual, size))
            np.testing.assert_array_equal(own, token_map.flatten().numpy(), err_msg=f"scale {index}")
            added = quantizer.contribution(quantizer.lookup(token_map), index, 5, full)
            expected, residual = expected + added, residual - added
        np.testing.assert_allclose(total, expected[0].numpy(), atol=1e-5)


def test_of_equally_near_codes_the_first():
    twice = Codebook(np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]), {}, 0.5)
    assert twice.nearest(np.array([[0.9, 0.1], [0.0, 0.3], [-2.0, 0.0]])).tolist() == [0, 0, 1]


GIVEN = GivenCodes({3: np.array([True, False, True, False])}, {3: np.array([63, 5, 0, 17])})


def test_kept_codes_are_forced_and_the_others_drawn_as_without():
    noise, drawn = GIVEN.noise(8)(3, (4, 1)), uniform_noise(8, 3, (4, 1))
    assert noise.dtype == np.float32
    assert noise[:, 0].tolist() == [-64.0, drawn[1, 0], -1.0, drawn[3, 0]]
    logits = torch.randn(4, 64, generator=torch.manual_seed(0))
    free, found = (Ranking(logits, 64, torch.zeros(1), None).draw(torch.from_numpy(n[:, 0])) for n in (drawn, noise))
    assert found.tolist() == [63, free[1], 0, free[3]]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_kept_code_is_never_mixed_though_it_be_out_of_the_running(ratio: float):
    gumbel = GIVEN.noise(8)(3, (4, 64), GUMBEL)
    np.testing.assert_array_equal(gumbel[[1, 3]], uniform_noise(8, 3, (4, 64), GUMBEL)[[1, 3]])
    logits = 30 * torch.randn(4, 64, generator=torch.manual_seed(0))
    ranking = Ranking(logits, 64, torch.tensor([0.5]), torch.tensor([2]))  # at most two codes are left
    mixed = ranking.mix(torch.from_numpy(gumbel), torch.tensor([ratio]))
    assert torch.equal(mixed[[0, 2]], torch.eye(64)[[63, 0]]), "exactly one, or its vector would be another"
    assert mixed[[1, 3]].max() <= 1
    assert mixed.isfinite().all()


def test_other_streams_are_as_without():
    asked = (3, (4, 2), "residual_noise")
    np.testing.assert_array_equal(GIVEN.noise(8)(*asked), uniform_noise(8, *asked))
