"""How fast this CPU multiplies matrices of each element type: measured, for what a CPU's flags promise is no speed.

There are CPUs with instructions for bfloat16 products that run at half the rate of their fp32 ones, and others where
they run at twice that rate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

ROWS, WIDTH = 256, 1024  # of the product: rows of a middle scale, a layer of some hundred million parameters
ROUNDS = 5  # of all types in turn, in CPU seconds; the fastest counts: other work on the machine makes none faster
CLEARLY = 1.1  # times as fast: with less to gain, the finer numbers are worth more


def fastest(speeds: Mapping[str, float]) -> str:
    """The element type to compute in: the first, unless another is clearly faster."""
    first, *others = speeds
    best = max(others, key=speeds.__getitem__, default=first)
    return best if speeds[best] > CLEARLY * speeds[first] else first


@cache
def product_speeds(torch: Any, types: Sequence[str]) -> Mapping[str, float]:
    """GFLOP/s of one thread by element type; takes a tenth of a second, once a process.

    Args:
        torch: the module.
        types: a tuple of element types by name, "float32" and "bfloat16" say.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return speeds_of({name: _product(torch, getattr(torch, name)) for name in types})
    finally:
        torch.set_num_threads(threads)


def speeds_of(
    products: Mapping[str, Callable[[], object]], clock: Callable[[], float] = time.thread_time
) -> dict[str, float]:
    """GFLOP/s of products by name; each is run once before it is timed."""
    seconds = dict.fromkeys(products, float("inf"))
    for timed in (False, *[True] * ROUNDS):
        for name, product in products.items():
            begun = clock()
            product()
            if timed:
                seconds[name] = min(seconds[name], clock() - begun)
    return {name: 2e-9 * ROWS * WIDTH**2 / spent for name, spent in seconds.items()}


def _product(torch: Any, dtype: Any) -> Callable[[], object]:
    rows, matrix = (torch.ones(size, WIDTH, dtype=dtype) for size in (ROWS, WIDTH))

    def product() -> object:
        with torch.inference_mode():
            return torch.nn.functional.linear(rows, matrix)

    return product
