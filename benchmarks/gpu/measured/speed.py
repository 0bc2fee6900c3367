"""Section "speed": the model at 1024x1024, pruned and dense: milliseconds of every scale, graphs on and off."""

from __future__ import annotations

from benchmarks.contenders import EngineContender
from benchmarks.eager import release_memory
from benchmarks.gpu.drawing import WAYS, contender_of, decoder_record, scales_record, timed_runs
from benchmarks.gpu.recipes import DENSE, FIRST
from benchmarks.gpu.sections import Context


def measure(context: Context) -> None:
    """Recorded launches first: those are what a pipeline runs."""
    for way, graphs in reversed(WAYS.items()):
        for name in (FIRST, DENSE):
            measure_bundle(context, name, way, graphs)


def measure_bundle(context: Context, name: str, way: str, graphs: bool) -> None:
    """A line for the scales, and one for the decoder, of one opened bundle."""
    opened: list[EngineContender] = []  # once, and not at all where the journal has both lines

    def contender() -> EngineContender:
        if not opened:
            opened.append(contender_of(context.bundle(name), graphs))
        return opened[0]

    context.log.measure(f"{name}, {way}", lambda: scales_record(contender().plan, timed_runs(contender())))
    if graphs:
        context.log.measure(f"{name}, decoder", lambda: decoder_record(contender()))
    opened.clear()
    release_memory()  # else torch keeps it, and of recorded graphs nothing else may use it
