import pytest

from fastvar.errors import CheckpointError
from fastvar.families.codebook import VAR_TOKENIZER, VqTokenizerConfig, phi_index


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
        (5, [0, 1, 2, 2, 3]),  # the middle one is a tie, which rounding decides
        (7, [0, 0, 1, 2, 2, 3, 3]),
        (1, [0]),
    ],
)
def test_every_scale_goes_by_the_published_phi(scales: int, expected: list[int]):
    assert [phi_index(scale, scales) for scale in range(scales)] == expected


def test_the_published_tokenizer_halves_the_image_four_times():
    assert VAR_TOKENIZER.patch_size == 16
    assert VAR_TOKENIZER.level_channels == (160, 160, 320, 320, 640)


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ({"base_channels": 24}, "multiples of 32"),
        ({"phis": 3}, "expected: 4"),
        ({"codes": 0}, "not positive"),
        ({"channel_multipliers": ()}, "not positive"),
    ],
)
def test_impossible_sizes_are_refused(field: dict[str, object], expected: str):
    with pytest.raises(CheckpointError, match=expected):
        VqTokenizerConfig(**{"codes": 64, "code_channels": 8, **field})
