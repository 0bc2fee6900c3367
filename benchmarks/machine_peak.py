"""What a machine gives at most: a matrix product and a copy, timed with torch. Shares of a peak are shares of these."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

from fastvar.core.precision import COMPUTE

GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
INT8 = "int8"
TRIALS = 10  # the best counts: a peak is what is possible


def gemm_flop_per_s(precision: str, device: str, side: int | None = None) -> float:
    """FLOP/s of a square product in a precision of `precision.COMPUTE`, or INT8; fp32 is true fp32, never TF32."""
    side = side or GEMM_SIDE[device]
    if precision == INT8:
        left, right = (torch.ones(side, side, device=device, dtype=torch.int8) for _ in range(2))
        total = torch.empty(side, side, device=device, dtype=torch.int32)
        return 2 * side**3 / _best_s(lambda: torch._int_mm(left, right, out=total), device)
    dtype = getattr(torch, COMPUTE[precision])
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best_s(lambda: torch.mm(a, b, out=out), device)


def copied_bytes_per_s(device: str, size: int | None = None) -> float:
    """Bytes read and bytes written, added up, per second of a copy inside the device's memory."""
    source = torch.ones((size or COPY_BYTES[device]) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_s(lambda: target.copy_(source), device)


def measured_peaks(precisions: Iterable[str], device: str) -> dict[str, float]:
    """Precision -> FLOP/s, and "copy" -> bytes/s."""
    found = {precision: gemm_flop_per_s(precision, device) for precision in sorted(set(precisions))}
    return {**found, "copy": copied_bytes_per_s(device)}


def _best_s(run: Callable[[], object], device: str) -> float:
    """Seconds of the best trial; the first one warms up."""
    spent = []
    for _ in range(TRIALS + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return min(spent[1:])
