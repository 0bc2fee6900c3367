from dataclasses import replace

import numpy as np
import pytest

from fastvar.core.noise import (
    CHOICE,
    DRAWN_SEED_BITS,
    MAX_SEED,
    ORDER,
    check_seed,
    draw,
    seeded_noise,
    seeds_from,
    uniform_noise,
)
from fastvar.core.plan import StepPlan
from fastvar.errors import InputError


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


# The logarithm of a platform may differ in its last bit; the numbers behind it may not.
@pytest.mark.parametrize(
    ("key", "stream", "numbers"),
    [
        ((0, 0), "gumbel", [3.0844037533, -0.5486797690, -0.0994810686, 0.4942376018]),
        ((7, 3), "gumbel", [-0.6311702728, 0.6885240078, 2.3647260666, 0.1962712258]),
        ((7, 3), "gumbel.1", [1.1987259388, -0.6620689631, 2.0028436184, 2.0237419605]),
        ((MAX_SEED, 12), "gumbel", [-1.5186096430, 1.2303447145, 1.9080600739, 2.9241502285]),
        ((7, 3), "residual_noise", [0.6553820968, 0.1214594096, -0.1167164668, 0.7001915574]),
        ((7, 9), "residual_noise.2", [-0.1599292904, 0.8776514530, 2.1122798920, 1.7465015650]),
        ((7, 3), "noise.1", np.array([4448043, 11107152, 5047403, 8528089]) / 2**24),
        ((0, 0), ORDER, [5, 4, 0, 1, 7, 6, 3, 2]),
        ((7, 9), ORDER, [7, 6, 3, 1, 2, 4, 0, 5]),
        ((MAX_SEED, 12), ORDER, [1, 2, 4, 7, 0, 3, 6, 5]),
    ],
)
def test_every_stream_stays_that_of_earlier_versions(key: tuple[int, int], stream: str, numbers: list[float]):
    shape = (8,) if stream == ORDER else (2, 2)
    found = uniform_noise(*key, shape, stream)
    assert (found.dtype, found.shape) == (np.float32, shape)
    np.testing.assert_allclose(found.ravel(), numbers, rtol=1e-5)


@pytest.mark.parametrize(
    ("stream", "mean", "variance"), [("gumbel", np.euler_gamma, np.pi**2 / 6), ("residual_noise", 0, 1)]
)
def test_streams_are_distributed_as_named(stream: str, mean: float, variance: float):
    numbers = uniform_noise(5, 2, (1000, 100), stream)
    assert abs(numbers.mean() - mean) < 0.02
    assert abs(numbers.var() - variance) < 0.03


# The last scale, 3x4 tokens, in three parts: 2, 4 and 6 tokens by the cosine.
PART = StepPlan(9, (3, 4), 2, 2, 100, 100, False, None, True, 100, 100, part=0, parts=3)


def test_the_parts_of_a_scale_take_each_of_its_tokens_once():
    """Upstream's order: the part that is drawn first has the tokens that wait longest."""
    order = uniform_noise(7, 9, (12,), ORDER).astype(np.int64)

    def noise(scale: int, shape: tuple[int, ...], *stream: str):
        return uniform_noise(7, scale, shape, *stream)

    parts = [draw(noise, replace(PART, part=part, tokens=n), (n,), "positions") for part, n in enumerate((2, 4, 6))]
    assert [part.dtype for part in parts] == [np.int64] * 3
    for part, expected in zip(parts, (order[10:], order[6:10], order[:6]), strict=True):
        np.testing.assert_array_equal(part, np.sort(expected))


@pytest.mark.parametrize("name", [CHOICE, "gumbel", "residual_noise"])
def test_parts_draw_from_streams_of_their_own(name: str):
    asked: list[tuple[object, ...]] = []

    def noise(*given: object):
        asked.append(given)
        return np.zeros(())

    for part in (None, 0, 1, 2):
        draw(noise, replace(PART, part=part), (4, 8), name)
    whole = (9, (4, 8)) if name == CHOICE else (9, (4, 8), name)
    assert asked == [whole, whole, (9, (4, 8), f"{name}.1"), (9, (4, 8), f"{name}.2")]


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


def test_a_seed_that_nobody_chose_is_short_enough_to_type(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    monkeypatch.setattr("secrets.randbits", lambda bits: asked.append(bits) or 2**bits - 1)
    assert seeds_from(None, 1) == [4294967295]
    assert asked == [DRAWN_SEED_BITS]


def test_noise_of_a_seed_is_that_of_the_seed():
    noise = seeded_noise(7)
    np.testing.assert_array_equal(noise(3, (2, 2)), uniform_noise(7, 3, (2, 2)))
    np.testing.assert_array_equal(noise(3, (2, 2), "gumbel"), uniform_noise(7, 3, (2, 2), "gumbel"))


def test_a_seed_that_python_does_not_write():
    with pytest.raises(InputError, match="seed of thousands of digits is out of range"):
        check_seed(10**5000)
