"""Section "speed": the model at 1024x1024, pruned and dense: milliseconds of every scale, graphs on and off."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.contenders import EngineContender
from benchmarks.gpu.recipes import DENSE, FIRST
from benchmarks.gpu.sections import Context
from benchmarks.gpu.truth import WAYS, contender_of
from benchmarks.timing import Run, one_image
from fastvar.core.plan import GenerationPlan

WARM_UP, RUNS = 2, 7
Record = dict[str, Any]


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


def timed_runs(contender: EngineContender, runs: int = RUNS, *, decode: bool = False) -> list[Run]:
    """Images behind those that warm up; the decoder needs the scales of one before it."""
    return [one_image(contender, abs(seed), decode=decode) for seed in range(-WARM_UP, runs)][WARM_UP:]


def scales_record(plan: GenerationPlan, runs: Sequence[Run]) -> Record:
    """Medians over the runs."""
    return {
        "runs": len(runs),
        "scales_ms": median(run.scales_ms for run in runs),
        "scales_ms_spread": [min(run.scales_ms for run in runs), max(run.scales_ms for run in runs)],
        "text_ms": median(run.text_ms for run in runs),
        "scales": [
            {"size": step.size, "tokens": step.tokens, "kept": step.kept, "ms": median(run.scale_ms[i] for run in runs)}
            for i, step in enumerate(plan.steps)
        ],
    }


def decoder_record(contender: EngineContender) -> Record:
    """Images with their decoder, which writes to the host."""
    spent = [run.decode_ms or 0.0 for run in timed_runs(contender, decode=True)]
    return {"runs": len(spent), "decode_ms": median(spent), "decode_ms_spread": [min(spent), max(spent)]}
