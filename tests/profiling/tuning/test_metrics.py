import numpy as np
import pytest

from fastvar.profiling.tuning.metrics import psnr, ssim


def test_psnr():
    black = np.zeros((32, 32, 3), np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black + 255, black) == pytest.approx(0)
    assert psnr(black + 16, black) == pytest.approx(20 * np.log10(255 / 16))


def _ssim_by_definition(x: np.ndarray, y: np.ndarray) -> float:
    """One 11x11 window at a time."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / 4.5)
    weights /= weights.sum()
    found = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            c1, c2 = 2.55**2, 7.65**2
            found.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(np.mean(found))


def test_ssim_follows_its_definition():
    rng = np.random.default_rng(0)
    luma = rng.integers(0, 256, (20, 18)).astype(np.uint8)
    other = np.clip(luma + rng.normal(0, 30, luma.shape), 0, 255).astype(np.uint8)
    gray, gray_other = (np.repeat(plane[..., None], 3, axis=2) for plane in (luma, other))
    expected = _ssim_by_definition(luma.astype(float), other.astype(float))
    assert ssim(gray, gray_other) == pytest.approx(expected, abs=1e-9)
    assert ssim(gray, gray) == pytest.approx(1)
