"""Residual quantisation in numpy gives the bits of torch's, which gives the published ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fastvar.core.resize import area_matrix
from fastvar.export.models.infinity.reference import codes_grid
from fastvar.export.models.infinity.tokenizer import ImageTokenizer, bits_to_codes
from fastvar.families.infinity_presets import schedule_for
from fastvar.runtime.editing.quantiser import quantize, tokens_of

GOLDEN = load_file(Path(__file__).parents[2] / "golden/vae_quantiser.safetensors")
SQUARE = [(1, 1), (2, 2), (4, 4), (6, 6), (8, 8), (12, 12), (16, 16)]
GRIDS = {
    "square": SQUARE,
    "patchify": [(2 * h, 2 * w) for h, w in SQUARE],
    "scales skipped": [(1, 1), (4, 4), (16, 16)],
    "last scale skipped": [(1, 1), (6, 6), (12, 12)],
    "portrait": list(schedule_for((336, 192)).sizes),
    "landscape": list(schedule_for((144, 432)).sizes),
}


def torchs(latent: np.ndarray, grids: list[tuple[int, int]]) -> tuple[list[np.ndarray], np.ndarray]:
    bits, total = ImageTokenizer.quantize(None, torch.from_numpy(latent)[None], grids)
    return [b[0].permute(2, 0, 1).numpy() for b in bits], total[0].numpy()


@pytest.mark.parametrize("name", GRIDS)
def test_bits_are_torchs(name: str):
    grids = GRIDS[name]
    full = {"scales skipped": (16, 16), "last scale skipped": (16, 16)}.get(name, grids[-1])
    for seed in range(3):
        latent = np.random.default_rng(seed).normal(0.1, 0.4, (8, *full)).astype(np.float32)
        (mine, total), (theirs, expected) = quantize(latent, grids), torchs(latent, grids)
        for grid, found, wanted in zip(grids, mine, theirs, strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=str(grid))
        np.testing.assert_allclose(total, expected, atol=1e-5)


def test_bits_and_sum_are_the_published_ones():
    bits, total = quantize(GOLDEN["h"][0], SQUARE)
    for index, found in enumerate(bits):
        expected = GOLDEN[f"s{index:02}.bits"].astype(bool).reshape(*SQUARE[index], -1)
        np.testing.assert_array_equal(found.transpose(1, 2, 0), expected)
    np.testing.assert_allclose(total, GOLDEN["z"][0], atol=1e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_a_token_holds_its_cells_in_the_order_of_the_model(patch: int):
    """`codes_grid` is what the reference makes of drawn bits."""
    cells = np.random.default_rng(0).random((3, 4 * patch, 5 * patch)) < 0.5
    tokens = tokens_of(cells, patch)
    assert tokens.shape == (20, 3 * patch**2)
    codes = codes_grid(torch.from_numpy(tokens), (4, 5), patch)
    torch.testing.assert_close(codes, bits_to_codes(torch.from_numpy(cells)[None]))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 40), st.integers(1, 40))
def test_area_matrix_is_torchs(source: int, target: int):
    values = torch.randn(1, 1, source, 1, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(values, size=(target, 1), mode="area")[0, 0, :, 0].numpy()
    np.testing.assert_allclose(area_matrix(source, target) @ values[0, 0, :, 0].numpy(), expected, atol=1e-5)
