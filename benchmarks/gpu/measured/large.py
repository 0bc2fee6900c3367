"""Section "large": 2048x2048 and a wide size, with the memory that NVML sees against a card's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu.drawing import contender_of, scales_record, timed_runs
from benchmarks.gpu.recipes import LARGE, WIDE
from benchmarks.gpu.sections import Context
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import BackendError
from fastvar.profiling.memory_run import run_apart
from fastvar.profiling.sampler import Sampler, sampler_for
from fastvar.runtime.memory.fit import device_need
from fastvar.runtime.memory.layout import build_layout

CARD_BYTES = 15 << 30
ROWS, RUNS = 2, 3


def measure(context: Context) -> None:
    """A line a size, each from a process of its own: of what one has drawn with, torch keeps memory for the next."""
    for name in (LARGE, WIDE):
        context.log.measure(name, partial(run_apart, f"drew {name}", large_image, context.path(name)))


def large_image(path: Path) -> dict[str, Any]:
    """Scales, decoder and memory, from before the bundle is opened on the GPU to behind its last image."""
    bundle = Bundle.open(path)
    sampler, why = nvml_sampler()
    if sampler is None:
        missing = {"peak_bytes": None, "fits_card": None, "no_nvml": why}
        return {**_images(bundle), "planned_bytes": planned_bytes(bundle), "memory": missing}
    with sampler:
        images = _images(bundle)
    recording = sampler.recording
    found: dict[str, Any] = {
        "before_bytes": recording.device_before_bytes,
        "device_peak_bytes": recording.device_peak_bytes,
        "peak_bytes": recording.peak_bytes,
        "source": recording.peak.source,
        "card_bytes": CARD_BYTES,
        "fits_card": recording.peak_bytes <= CARD_BYTES,
    }
    return {**images, "planned_bytes": planned_bytes(bundle), "memory": found}


def _images(bundle: Bundle) -> dict[str, Any]:
    contender = contender_of(bundle)
    runs = timed_runs(contender, RUNS, decode=True)
    return {**scales_record(contender.plan, runs), "decode_ms": median(run.decode_ms or 0.0 for run in runs)}


def planned_bytes(bundle: Bundle) -> dict[str, Any]:
    return vars(device_need([build_layout(bundle.manifest, ROWS)]))


def nvml_sampler() -> tuple[Sampler | None, str]:
    """A sampler of the GPU; or none, and the reason: timings are worth having without it."""
    try:
        sampler = sampler_for("cuda")
        with sampler:
            pass
    except BackendError as error:
        return None, str(error)
    return sampler_for("cuda"), ""
