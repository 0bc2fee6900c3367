"""Section "tensorrt": engines of TensorRT-RTX and TensorRT, where these are installed; built here, for no other can."""

from __future__ import annotations

import importlib.util
from functools import partial

from benchmarks.builder import DEMO, Builder
from benchmarks.gpu.drawing import TOLERANCES, contender_of, forced, parity, scales_record, timed_runs
from benchmarks.gpu.sections import BUNDLES, Context

LIBRARIES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
# Sizes and policies that are timed.
TIMED = (("1024x1024", "dense"), ("1024x1024", "fastvar"), ("2048x2048", "fastvar"))


def measure(context: Context) -> None:
    """Lines of truth and of time for each library that is there."""
    for backend, library in LIBRARIES.items():
        if importlib.util.find_spec(library) is None:
            context.log.measure(backend, partial(dict, skipped=f"{library} is not installed"))
            continue
        measure_library(context, backend)


def measure_library(context: Context, backend: str) -> None:
    target = built_target(backend, context.identity.capability)
    builder = Builder(context.work / BUNDLES, backend, target)
    for precision in TOLERANCES:
        context.log.measure(
            f"{backend} {precision}",
            partial(truth, context, builder, backend, precision),
        )
    for size, policy in TIMED:
        context.log.measure(
            f"{backend} {size} {policy}",
            partial(timing, builder, context.identity.model, backend, size, policy),
        )


def truth(context: Context, builder: Builder, backend: str, precision: str) -> dict[str, object]:
    bundle = builder.gpu(f"demo-{backend}-{precision}", *DEMO, "--precision", precision)
    return parity(forced(context.bundle("demo-cpu")), forced(bundle), precision)


def timing(builder: Builder, model: str, backend: str, size: str, policy: str) -> dict[str, object]:
    name = f"{size}-{policy}-{backend}"
    bundle = builder.gpu(name, "--random-weights", model, "--size", size, "--policy", policy)
    contender = contender_of(bundle)
    return scales_record(contender.plan, timed_runs(contender))


def built_target(backend: str, capability: str) -> str:
    """The GPU's own name where the library lists it, else the mask of everything from sm80 on."""
    from fastvar.engines.tensorrt.backend import ANY, TensorRTRTXBackend

    if backend != "tensorrt-rtx":
        return "current"
    return capability if capability in TensorRTRTXBackend().known_targets() else ANY
