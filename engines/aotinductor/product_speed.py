"""How fast this CPU multiplies matrices of each element type: measured, for what a CPU's flags promise is no speed.

There are CPUs with instructions for bfloat16 products that run at half the rate of their fp32 ones, and others where
they run at twice that rate. What is timed is what engines call: oneDNN's linear layer, torch's own in types that oneDNN
refuses somewhere (targets.onednn_types), and our kernel for int8.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from ...core.platform import cpu_identity
from ...core.version import __version__
from ...errors import BackendError, BuildError
from ..cache.product_speeds import FLOATS, INT8, ProductSpeeds, fastest, keep_speeds, kept_speeds
from .operators import LINEAR_INT8, register
from .targets import best_cpu, onednn_types

ROWS, WIDTH = 256, 1024  # of the product: rows of a middle scale, a layer of some hundred million parameters
ROUNDS = 5  # of all types in turn, in CPU seconds; the fastest counts: other work on the machine makes none faster
Product = Callable[[], object]


def product_speeds(
    torch: Any, folder: Path | None, candidates: Sequence[str] = FLOATS, *, anew: bool = False
) -> ProductSpeeds:
    """What was measured on this CPU with this torch, or is measured now; that takes a second, once a process.

    Args:
        torch: the module.
        folder: where figures are kept from process to process; None to neither read nor keep any.
        candidates: element types that engines for this CPU may compute in, the finest first.
        anew: measure, whatever is kept.
    """
    cpu, version = cpu_identity(), str(torch.__version__)
    if folder is not None and not anew and (kept := kept_speeds(folder, cpu, version)) is not None:
        return kept
    if anew:
        _measured.cache_clear()
    gflops, whole = _measured(torch)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = ProductSpeeds(cpu, version, __version__, now, dict(gflops), fastest(gflops, candidates))
    if folder is not None and whole:
        keep_speeds(folder, found)
    return found


@cache
def _measured(torch: Any) -> tuple[Mapping[str, float], bool]:
    """GFLOP/s of one thread by element type; and whether none is missing, for want of a C++ compiler, that this CPU
    multiplies.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        products = {name: _product(torch, name) for name in FLOATS}
        int8, whole = _int8_product(torch), True
        try:
            int8()
            products[INT8] = int8
        except BackendError:  # this CPU lacks its instructions
            pass
        except BuildError:
            whole = False
        return speeds_of(products), whole
    finally:
        torch.set_num_threads(threads)


def speeds_of(products: Mapping[str, Product], clock: Callable[[], float] = time.thread_time) -> dict[str, float]:
    """GFLOP/s of products by name, to a tenth; each is run once before it is timed."""
    seconds = dict.fromkeys(products, float("inf"))
    for timed in (False, *[True] * ROUNDS):
        for name, product in products.items():
            begun = clock()
            product()
            if timed:
                seconds[name] = min(seconds[name], clock() - begun)
    return {name: round(2e-9 * ROWS * WIDTH**2 / spent, 1) for name, spent in seconds.items()}


def _product(torch: Any, name: str) -> Product:
    """A linear layer as engines call it."""
    dtype = getattr(torch, name)
    rows, matrix = (torch.ones(size, WIDTH, dtype=dtype) for size in (ROWS, WIDTH))
    bias = torch.zeros(WIDTH, dtype=dtype)
    onednn = name in onednn_types(best_cpu(torch))

    def product() -> object:
        with torch.inference_mode():
            if onednn:
                return torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")
            return torch.nn.functional.linear(rows, matrix, bias)

    return product


def _int8_product(torch: Any) -> Product:
    """Our kernel's linear layer: activations are quantised as they come."""
    rows = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)
    matrix = torch.ones(WIDTH, WIDTH, dtype=torch.int8)
    scale, bias = torch.ones(WIDTH, dtype=torch.bfloat16), torch.zeros(WIDTH, dtype=torch.bfloat16)
    layer = register(LINEAR_INT8)

    def product() -> object:
        with torch.inference_mode():
            return layer(rows, matrix, scale, bias, False)

    return product
