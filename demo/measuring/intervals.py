"""How sure an accuracy is: bootstrap intervals over scenes."""

import warnings

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVELS = (2.5, 97.5)  # percent

Interval = tuple[float, float]


def _resampled(counts: NDArray[np.int_], seed: int) -> NDArray[np.floating]:
    """Shares of many resamples: counts [N, K, 2] of correct and all readings -> [RESAMPLES, K]."""
    scenes = len(counts)
    weights = np.random.default_rng(seed).multinomial(scenes, np.full(scenes, 1 / scenes), RESAMPLES)
    sums = np.tensordot(weights, counts, axes=1)  # [RESAMPLES, K, 2]
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def share_intervals(counts: NDArray[np.int_], seed: int = 0) -> list[Interval]:
    """The 95 % interval of each of K shares, of counts [N scenes, K, 2]; not a number where nothing was read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        low, high = np.nanpercentile(_resampled(counts, seed), LEVELS, axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def ratio_interval(counts: NDArray[np.int_], reference: NDArray[np.int_], seed: int = 0) -> Interval:
    """The 95 % interval of one share over another of the same scenes, which are resampled together: both [N, 2]."""
    ratios = _resampled(counts[:, None], seed) / _resampled(reference[:, None], seed)
    low, high = np.percentile(ratios[:, 0], LEVELS)
    return float(low), float(high)
