"""Tokens that are taken from an image: its own until something is drawn, then those that make up for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastvar.core.noise import GUMBEL, uniform_noise
from fastvar.core.resize import bicubic_matrix, bilinear_matrix
from fastvar.export.models.codebook.steps import Ranking
from fastvar.export.models.codebook.tokenizer import Quantizer, area_pool
from fastvar.export.models.infinity.tokenizer import ImageTokenizer
from fastvar.families.codebook import VqTokenizerConfig, phi_index
from fastvar.families.var import SCALES_256
from fastvar.runtime.editing.codebook import Codebook
from fastvar.runtime.editing.given_tokens import FORCE_ONE, FORCE_ZERO, GivenBits, GivenCodes
from fastvar.runtime.editing.quantiser import quantize, resampled, tokens_of
from tests.models.codebooks import RECORDED, codebook_of, recorded_codebook

SIDES = list(enumerate(SCALES_256))
GRIDS = {i: ((side, side), phi_index(i, len(SIDES))) for i, side in SIDES}
ALL = {i: np.ones(side * side, bool) for i, side in SIDES}


def NOT_ASKED(scale: int) -> np.ndarray:  # noqa: N802  a constant in the place of a function
    raise AssertionError(f"asked for the sum before scale {scale}")


def drawing_from(first: int) -> dict[int, np.ndarray]:
    """Kept tokens: all before a scale; from there on the left half is drawn."""
    left = {i: np.tile(np.arange(side) < max(side // 2, 1), side) for i, side in SIDES}
    return {i: ALL[i] if i < first else ~left[i] for i in ALL}


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return load_file(RECORDED / "quant_and_teacher.safetensors")


@pytest.fixture(scope="module")
def recorded_codes(recorded) -> dict[int, np.ndarray]:
    ends = np.cumsum([side * side for _, side in SIDES])
    return dict(enumerate(np.split(recorded["idx_cat"][0], ends[:-1])))


def test_where_nothing_is_drawn_the_codes_are_the_published_ones(recorded, recorded_codes):
    """Exactly, at every scale, whatever rounding does to the sum of an engine: nobody asks for it."""
    given = GivenCodes(recorded["f_in"][0], ALL, recorded_codebook(), GRIDS)
    for scale, codes in recorded_codes.items():
        np.testing.assert_array_equal(given.at(scale, NOT_ASKED), codes)
        noise = given.noise(5, NOT_ASKED)(scale, (len(codes), 1))
        np.testing.assert_array_equal(noise[:, 0], -1.0 - codes)


@pytest.mark.parametrize("first", [0, 5, 9])
def test_up_to_the_first_scale_in_which_something_is_drawn_too(recorded, recorded_codes, first: int):
    given = GivenCodes(recorded["f_in"][0], drawing_from(first), recorded_codebook(), GRIDS)
    for scale in range(first + 1):
        np.testing.assert_array_equal(given.at(scale, NOT_ASKED), recorded_codes[scale])
    asked = []

    def sums(scale: int) -> np.ndarray:
        asked.append(scale)
        return recorded["f_in"][0]

    noise = given.noise(5, sums)
    for scale, side in SIDES:
        noise(scale, (side * side, 1))
    assert asked == list(range(first + 1, len(SIDES)))


def test_over_the_images_own_sum_the_codes_are_its_own(recorded, recorded_codes):
    """The recorded program's sum after scale 4, in fp32."""
    given = GivenCodes(recorded["f_in"][0], drawing_from(0), recorded_codebook(), GRIDS)
    np.testing.assert_array_equal(given.at(5, lambda _: recorded["f_hat_s04"][0]), recorded_codes[5])


def test_over_another_sum_the_codes_are_what_torch_makes_of_the_rest():
    torch.manual_seed(0)
    quantizer = Quantizer(VqTokenizerConfig(codes=40, code_channels=6, base_channels=32)).requires_grad_(False)
    codebook = codebook_of({n: t.numpy() for n, t in quantizer.state_dict().items()})
    latent, drawn = torch.randn(2, 1, 6, 16, 16)
    given = GivenCodes(latent[0].numpy(), drawing_from(0), codebook, GRIDS)
    for scale, side in SIDES[1:]:
        expected = quantizer.nearest(area_pool(latent - drawn, (side, side))).flatten()
        np.testing.assert_array_equal(given.at(scale, lambda _: drawn[0].numpy()), expected.numpy())


def test_codes_over_the_drawn_sum_end_nearer_to_the_image(recorded):
    """Outside of what is drawn. Every code there is drawn at random."""
    latent, codebook, rng = recorded["f_in"][0], recorded_codebook(), np.random.default_rng(0)
    given = GivenCodes(latent, drawing_from(0), codebook, GRIDS)
    own = GivenCodes(latent, ALL, codebook, GRIDS)
    drawn = {i: rng.integers(len(codebook.vectors), size=side * side) for i, side in SIDES}
    sums = {"own": np.zeros(latent.shape), "over what was drawn": np.zeros(latent.shape)}
    for scale, (size, phi) in GRIDS.items():
        for name, total in sums.items():
            found = own.at(scale, NOT_ASKED) if name == "own" else given.at(scale, lambda _, t=total: t.copy())
            codes = np.where(given.kept[scale], found, drawn[scale])
            grid = codebook.vectors[codes].T.reshape(-1, *size)
            total += codebook._smoothed(resampled(grid, (16, 16), bicubic_matrix), phi)
    outside = given.kept[9].reshape(16, 16)
    outside[:, :9] = False  # phi and enlarging reach one cell over
    errors = {name: np.square(latent - total)[:, outside].mean() for name, total in sums.items()}
    assert errors["over what was drawn"] < 0.6 * errors["own"], errors


BIT_GRIDS = {i: (side, side) for i, side in SIDES}


@pytest.fixture(scope="module")
def latent() -> np.ndarray:
    return np.random.default_rng(1).normal(0.1, 0.4, (8, 16, 16)).astype(np.float32)


def test_where_nothing_is_drawn_the_bits_are_the_images_own(latent: np.ndarray):
    given, (bits, _) = GivenBits(latent, ALL, BIT_GRIDS, 1), quantize(latent, BIT_GRIDS.values())
    for scale, own in enumerate(bits):
        np.testing.assert_array_equal(given.at(scale, NOT_ASKED), tokens_of(own, 1))


@pytest.mark.parametrize("patch", [1, 2])
def test_over_another_sum_the_bits_are_what_torch_makes_of_the_rest(latent: np.ndarray, patch: int):
    drawn = np.random.default_rng(2).normal(0, 0.4, latent.shape).astype(np.float32)
    grids = {i: (side * patch, side * patch) for i, side in SIDES if side * patch <= 16}
    kept = {i: drawing_from(0)[i] for i in grids}
    given = GivenBits(latent, kept, grids, patch)
    for scale, grid in list(grids.items())[1:]:
        ((expected,), _) = ImageTokenizer.quantize(None, torch.from_numpy(latent - drawn)[None], [grid])
        found = tokens_of(expected[0].permute(2, 0, 1).numpy(), patch)
        np.testing.assert_array_equal(given.at(scale, lambda _: drawn), found)
        noise = given.noise(3, lambda _: drawn)(scale, found.shape)
        np.testing.assert_array_equal(noise[kept[scale]], np.where(found, FORCE_ONE, FORCE_ZERO)[kept[scale]])
        free = uniform_noise(3, scale, found.shape)
        np.testing.assert_array_equal(noise[~kept[scale]], free[~kept[scale]])


def test_bits_over_the_drawn_sum_end_nearer_to_the_image(latent: np.ndarray):
    """Outside of what is drawn. Every bit there is drawn at random."""
    rng, kept = np.random.default_rng(0), drawing_from(0)
    given, own = GivenBits(latent, kept, BIT_GRIDS, 1), GivenBits(latent, ALL, BIT_GRIDS, 1)
    drawn = {i: rng.random((side * side, 8)) < 0.5 for i, side in SIDES}
    sums = {"own": np.zeros(latent.shape), "over what was drawn": np.zeros(latent.shape)}
    for scale, side in SIDES:
        for name, total in sums.items():
            found = own.at(scale, NOT_ASKED) if name == "own" else given.at(scale, lambda _, t=total: t.copy())
            bits = np.where(kept[scale][:, None], found, drawn[scale]).T.reshape(8, side, side)
            total += resampled(np.where(bits, 8**-0.5, -(8**-0.5)), (16, 16), bilinear_matrix)
    outside = kept[9].reshape(16, 16)
    errors = {name: np.square(latent - total)[:, outside].mean() for name, total in sums.items()}
    assert errors["over what was drawn"] < 0.5 * errors["own"], errors


def test_a_sum_that_is_not_finite_is_left_to_who_draws(latent: np.ndarray):
    given = GivenBits(latent, drawing_from(0), BIT_GRIDS, 1)
    for wrong in (np.nan, np.inf):
        assert np.isfinite(given.noise(1, lambda _, w=wrong: np.full(latent.shape, w, np.float32))(5, (36, 8))).all()


# How they are forced: scale 3 of a model, a 2x2 grid of 64 codes, of which cells 0 and 2 are kept

VECTORS = np.eye(64)
CODES = [63, 5, 0, 17]
KEPT = {3: np.array([True, False, True, False])}
CODEBOOK = Codebook(VECTORS, {0: (np.zeros((64, 64, 3, 3)), np.zeros(64))}, 0.5)
GIVEN = GivenCodes(VECTORS[CODES].T.reshape(64, 2, 2).astype(np.float32), KEPT, CODEBOOK, {3: ((2, 2), 0)})


def test_kept_codes_are_forced_and_the_others_drawn_as_without():
    noise, drawn = GIVEN.noise(8, NOT_ASKED)(3, (4, 1)), uniform_noise(8, 3, (4, 1))
    assert noise.dtype == np.float32
    assert noise[:, 0].tolist() == [-64.0, drawn[1, 0], -1.0, drawn[3, 0]]
    logits = torch.randn(4, 64, generator=torch.manual_seed(0))
    free, found = (Ranking(logits, 64, torch.zeros(1), None).draw(torch.from_numpy(n[:, 0])) for n in (drawn, noise))
    assert found.tolist() == [63, free[1], 0, free[3]]


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_kept_code_is_never_mixed_though_it_be_out_of_the_running(ratio: float):
    gumbel = GIVEN.noise(8, NOT_ASKED)(3, (4, 64), GUMBEL)
    np.testing.assert_array_equal(gumbel[[1, 3]], uniform_noise(8, 3, (4, 64), GUMBEL)[[1, 3]])
    logits = 30 * torch.randn(4, 64, generator=torch.manual_seed(0))
    ranking = Ranking(logits, 64, torch.tensor([0.5]), torch.tensor([2]))  # at most two codes are left
    mixed = ranking.mix(torch.from_numpy(gumbel), torch.tensor([ratio]))
    assert torch.equal(mixed[[0, 2]], torch.eye(64)[[63, 0]]), "exactly one, or its vector would be another"
    assert mixed[[1, 3]].max() <= 1
    assert mixed.isfinite().all()


def test_other_streams_are_as_without():
    asked = (3, (4, 2), "residual_noise")
    np.testing.assert_array_equal(GIVEN.noise(8, NOT_ASKED)(*asked), uniform_noise(8, *asked))
