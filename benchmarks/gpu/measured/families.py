"""Section "families": small models of the other families, truth and milliseconds."""

from __future__ import annotations

from functools import partial

from benchmarks.gpu.drawing import PRECISION, WAYS, contender_of, forced, parity, scales_record, timed_runs
from benchmarks.gpu.recipes import FAMILIES
from benchmarks.gpu.sections import Context


def measure(context: Context) -> None:
    """Lines of truth, then one of time, for each family."""
    for name in FAMILIES:
        for way, graphs in WAYS.items():
            context.log.measure(f"{name} truth, {way}", partial(truth, context, name, graphs))
        context.log.measure(f"{name} speed", partial(speed, context, name))


def truth(context: Context, name: str, graphs: bool) -> dict[str, object]:
    expected = forced(context.bundle(f"{name}-cpu"))
    return parity(expected, forced(context.bundle(f"{name}-gpu"), graphs), PRECISION)


def speed(context: Context, name: str) -> dict[str, object]:
    contender = contender_of(context.bundle(f"{name}-gpu"))
    return scales_record(contender.plan, timed_runs(contender))
