"""Host randomness: Philox keyed by (seed, scale), so that every backend draws the same image up to rounding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

MAX_SEED = 2**63 - 1
Noise = Callable[[int, tuple[int, ...]], NDArray[np.float32]]  # (scale index, [L, bits a token])


def check_seed(seed: int) -> int:
    """A seed in 0 .. 2**63 - 1.

    Raises:
        InputError: out of range or not a whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed {seed!r} is out of range", expected=f"a whole number from 0 to {MAX_SEED}")
    return int(seed)


def uniform_noise(seed: int, scale: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1), fp32, on a 2**-24 grid; a stream of its own for every scale."""
    generator = np.random.Generator(np.random.Philox(key=(seed << 64) | scale))
    return generator.random(shape, dtype=np.float32)
