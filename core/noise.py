"""Host randomness: Philox keyed by (seed, stream, scale), so that every backend draws the same image up to rounding."""

from __future__ import annotations

import secrets
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .arguments import shown
from .plan import StepPlan, part_counts

MAX_SEED = 2**63 - 1
DRAWN_SEED_BITS = 32  # of a seed that nobody chose: short enough to type again
ORDER = "order"
CHOICE = "noise"  # one uniform number for each choice of a bit or of a code
GUMBEL = "gumbel"  # one number for each code of each token, where codes are mixed
SCALARS = ("guidance", "tau", "cut", "top_k")  # settings, each an input with a number for every image
# What the host draws for a scale, by the name of the input.
DRAWN = (
    CHOICE,  # uniform
    GUMBEL,  # Gumbel [L, codes]: weights of a smooth embedding
    "residual_noise",  # normal [steps + 1, L, channels]: what the diffusion head starts from, and adds
    "positions",  # [tokens of the part] int64: the scale's tokens in a random order, in parts
)


# What one scale draws: (scale index, shape[, name of the input]) -> float32. The name may be left out for the choices,
# which every family has.
Noise = Callable[..., NDArray[Any]]


def check_seed(seed: int) -> int:
    """A seed in 0 .. 2**63 - 1.

    Raises:
        InputError: out of range or not a whole number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed {shown(seed)} is out of range", expected=f"a whole number from 0 to {MAX_SEED}")
    return int(seed)


def seeds_from(seed: int | None, count: int) -> list[int]:
    """The seeds of `count` images: `seed` and those that follow it. None draws the first one.

    Raises:
        InputError: a seed out of range.
    """
    first = secrets.randbits(DRAWN_SEED_BITS) if seed is None else check_seed(seed)
    return [check_seed(first + i) for i in range(count)]


def uniform_noise(seed: int, scale: int, shape: tuple[int, ...], stream: str = CHOICE) -> NDArray[np.float32]:
    """What a seed draws for a scale, fp32; every scale and every input has a stream of its own.

    Choices are uniform in [0, 1) on a 2**-24 grid. "gumbel" is -log(-log(u)), "residual_noise" is normal; "order" is a
    random order of `shape[0]` tokens. A name may go on behind a dot: another stream of the same kind.
    """
    kind = stream.split(".")[0]
    key = (seed << 64) | (0 if stream == CHOICE else zlib.crc32(stream.encode()) << 32) | scale
    generator = np.random.Generator(np.random.Philox(key=key))
    if kind == CHOICE:
        return generator.random(shape, dtype=np.float32)
    if kind == GUMBEL:
        return -np.log(generator.standard_exponential(shape, dtype=np.float32))
    if kind == ORDER:
        return generator.permutation(shape[0]).astype(np.float32)
    return generator.standard_normal(shape, dtype=np.float32)


def seeded_noise(seed: int) -> Noise:
    """Noise of a seed, drawn anew for every scale."""
    return partial(uniform_noise, seed)


def draw(noise: Noise, step: StepPlan, shape: tuple[int, ...], name: str) -> NDArray[np.float32] | NDArray[np.int64]:
    """One input of a step. Parts of a scale have streams of their own, and share one order of its tokens."""
    if name == "positions":
        return _positions(noise, step)
    stream = name if not step.part else f"{name}.{step.part}"
    return noise(step.index, shape) if stream == CHOICE else noise(step.index, shape, stream)


def draw_all(
    noises: Sequence[Noise], step: StepPlan, shape: tuple[int, ...], name: str
) -> NDArray[np.float32] | NDArray[np.int64]:
    """The same input of several images, each with its own noise: token by token, the images side by side."""
    if len(noises) == 1:
        return draw(noises[0], step, shape, name)
    axis = 1 if name == "residual_noise" else 0
    one = (*shape[:axis], shape[axis] // len(noises), *shape[axis + 1 :])
    drawn = np.stack([draw(noise, step, one, name) for noise in noises], axis=axis + 1)
    joined: NDArray[Any] = drawn.reshape(shape)
    return joined


def _positions(noise: Noise, step: StepPlan) -> NDArray[np.int64]:
    """The tokens of a part, ascending: those that wait longest come first in the order (upstream HART)."""
    assert step.part is not None
    tokens = step.size[0] * step.size[1]
    order = noise(step.index, (tokens,), ORDER).astype(np.int64)
    counts = part_counts(tokens, step.parts)
    later = tokens - sum(counts[: step.part + 1])
    return np.sort(order[later : later + counts[step.part]])
