"""Section "batch": the model at 1024x1024 in passes of 1, 4 and 8 images: truth, and milliseconds an image."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.gpu.drawing import PRECISION, Forced, contender_of, forced, parity, scales_record, timed_runs
from benchmarks.gpu.recipes import BATCHED, BATCHES
from benchmarks.gpu.sections import Context
from fastvar.engines.bundle.bundle import Bundle
from fastvar.profiling.estimates.passes import pass_launches
from fastvar.profiling.memory_run import run_apart
from fastvar.runtime.memory.fit import device_need
from fastvar.runtime.memory.layout import build_layout

ROWS, RUNS = 2, 3


def measure(context: Context) -> None:
    """A line of time for each number of images, then one whether each of them is what it is alone; from processes of
    their own, for torch keeps the memory of what has drawn."""
    path = context.path(BATCHED)
    for images in BATCHES:
        context.log.measure(f"{images} in a pass", partial(run_apart, f"drew {images}", timed_pass, path, images))
    for images in BATCHES[1:]:
        context.log.measure(
            f"{images} against alone", partial(run_apart, f"compared {images}", against_alone, path, images)
        )


def timed_pass(path: Path, images: int) -> dict[str, Any]:
    """Scales and decoder of a pass, what an image takes of it, and what was predicted of launches and memory."""
    bundle = Bundle.open(path)
    contender = contender_of(bundle, images=images)
    layout = build_layout(bundle.manifest, ROWS, images)
    runs = timed_runs(contender, RUNS, decode=True)
    found, decode_ms = scales_record(contender.plan, runs), median(run.decode_ms or 0.0 for run in runs)
    return {
        "images": images,
        "scales_ms_an_image": found["scales_ms"] / images,
        "decode_ms_an_image": decode_ms / images,
        **found,
        "decode_ms": decode_ms,
        "launches": vars(pass_launches(bundle.manifest, layout)),
        "planned_bytes": device_need([layout]).total_bytes,
    }


def against_alone(path: Path, images: int) -> dict[str, Any]:
    """Every image of a pass against the image alone, on equal forced choices."""
    bundle = Bundle.open(path)
    alone = forced(bundle)
    expected = Forced([np.repeat(scale, images, axis=0) for scale in alone.logits], alone.image)
    return parity(expected, forced(bundle, images=images), PRECISION)
