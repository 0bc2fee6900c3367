"""Residual quantisation over a codebook in numpy gives the published codes, and torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastvar.export.models.codebook.tokenizer import Quantizer, area_pool
from fastvar.families.codebook import VqTokenizerConfig, phi_index
from fastvar.families.var import SCALES_256
from fastvar.runtime.editing.codebook import Codebook
from tests.models.codebooks import RECORDED, codebook_of, recorded_codebook

TINY = VqTokenizerConfig(codes=40, code_channels=6, base_channels=32)


def test_codes_and_sum_are_the_published_ones():
    """Every index of every scale."""
    recorded = load_file(RECORDED / "quant_and_teacher.safetensors")
    grids = [((side, side), phi_index(i, len(SCALES_256))) for i, side in enumerate(SCALES_256)]
    codes, total = recorded_codebook().quantize(recorded["f_in"][0], grids)
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
