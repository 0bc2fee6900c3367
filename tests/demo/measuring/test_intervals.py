import numpy as np
import pytest

from demo.measuring.intervals import ratio_interval, share_intervals


def _counts(right: np.ndarray) -> np.ndarray:
    """One reading a scene: [N] of 0 and 1 -> [N, 2]."""
    return np.stack((right, np.ones_like(right)), axis=1)


def test_the_interval_of_a_share_is_that_of_the_binomial():
    right = (np.arange(400) % 5 > 0).astype(int)  # 0.8
    ((low, high),) = share_intervals(_counts(right)[:, None])
    spread = 1.96 * np.sqrt(0.8 * 0.2 / 400)
    assert (low, high) == pytest.approx((0.8 - spread, 0.8 + spread), abs=0.006)


def test_scenes_and_not_readings_are_resampled():
    alike = np.repeat((np.arange(40) % 2), 10)  # ten readings of a scene are all right or all wrong
    by_scene = np.stack((alike.reshape(40, 10).sum(1), np.full(40, 10)), axis=1)
    ((low, high),) = share_intervals(by_scene[:, None])
    ((low_1, high_1),) = share_intervals(_counts(alike)[:, None])
    assert high - low > 2 * (high_1 - low_1)


def test_the_ratio_of_paired_scenes_is_surer_than_their_shares():
    rng = np.random.default_rng(0)
    reference = (rng.random(500) < 0.8).astype(int)
    other = np.where(rng.random(500) < 0.02, 1 - reference, reference)
    low, high = ratio_interval(_counts(other), _counts(reference))
    assert low < other.sum() / reference.sum() < high
    ((low_1, high_1),) = share_intervals(_counts(reference)[:, None])
    assert high - low < (high_1 - low_1) / 2
    assert ratio_interval(_counts(reference), _counts(reference)) == (1.0, 1.0)


def test_an_attribute_that_was_never_read_is_not_a_number():
    ((low, high),) = share_intervals(np.zeros((5, 1, 2), int))
    assert np.isnan([low, high]).all()
