"""Image metrics: PSNR and SSIM of pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]  # [H, W, 3]
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # the 11x11 Gaussian window of Wang et al. 2004
LUMA = np.array([0.299, 0.587, 0.114])


def psnr(image: Pixels, reference: Pixels) -> float:
    """Peak signal to noise ratio in decibels; infinite for equal images."""
    error = np.mean((image.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(image: Pixels, reference: Pixels) -> float:
    """Structural similarity of the luma (Wang et al. 2004), mean over all windows inside the image."""
    x, y = (np.asarray(pixels, np.float64) @ LUMA for pixels in (image, reference))  # [H, W]
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _windowed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean of each whole window: [H, W] -> [H - 10, W - 10]."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    kernel = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(values, len(kernel), axis)
        values = windows @ (kernel / kernel.sum())
    return values
