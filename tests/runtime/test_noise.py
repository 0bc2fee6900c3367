import numpy as np
import pytest

from fastvar.errors import InputError
from fastvar.runtime.noise import DRAWN_SEED_BITS, MAX_SEED, check_seed, seeds_from, uniform_noise


def test_same_seed_and_scale_give_the_same_numbers():
    first, second = uniform_noise(7, 3, (5, 4)), uniform_noise(7, 3, (5, 4))
    assert first.dtype == np.float32
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("other", [(8, 3), (7, 4), (3, 7), (MAX_SEED, 3)])
def test_every_seed_and_scale_has_a_stream_of_its_own(other: tuple[int, int]):
    shape = (64, 8)
    assert np.mean(uniform_noise(7, 3, shape) == uniform_noise(*other, shape)) < 0.01


def test_numbers_are_uniform_below_one():
    noise = uniform_noise(0, 12, (4096, 16))
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean() - 0.5) < 0.01
    assert abs(noise.var() - 1 / 12) < 0.01
    assert np.array_equal(noise * 2**24, np.floor(noise * 2**24)), "numbers lie on a 2**-24 grid"


@pytest.mark.parametrize(
    ("key", "grid"),
    [
        ((0, 0), [582872, 193722, 10266821, 4052523]),
        ((7, 3), [957549, 2699686, 15204485, 13806896]),
        ((MAX_SEED, 12), [4816742, 2823049, 3223374, 2360463]),
    ],
)
def test_numbers_stay_those_of_earlier_versions(key: tuple[int, int], grid: list[int]):
    """Multiples of 2**-24. A change here gives every user another image for the seed she wrote down."""
    np.testing.assert_array_equal(uniform_noise(*key, (2, 2)).ravel() * 2**24, grid)


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED, np.int64(5)])
def test_accepted_seeds(seed: int):
    checked = check_seed(seed)
    assert type(checked) is int
    assert checked == seed


@pytest.mark.parametrize("seed", [-1, 2**63, 2**200, True, 1.0, float("nan"), "7", None])
def test_refused_seeds(seed: object):
    with pytest.raises(InputError, match="is out of range") as error:
        check_seed(seed)
    assert repr(seed) in error.value.problem
    assert str(MAX_SEED) in error.value.expected


def test_seeds_count_up_from_the_one_given_or_drawn():
    assert seeds_from(5, 3) == [5, 6, 7]
    drawn = [seeds_from(None, 2) for _ in range(20)]
    assert all(second == first + 1 and 0 <= first < 2**DRAWN_SEED_BITS for first, second in drawn)
    assert len({first for first, _ in drawn}) > 15
    with pytest.raises(InputError, match="seed 9223372036854775808"):
        seeds_from(MAX_SEED, 2)


def test_a_seed_that_python_does_not_write():
    with pytest.raises(InputError, match="seed of thousands of digits is out of range"):
        check_seed(10**5000)
