"""Section "attention": flash against cuDNN in the same model, in turn."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.contenders import EngineContender
from benchmarks.gpu.drawing import contender_of, forced, relative_error
from benchmarks.gpu.recipes import FIRST, WITH_CUDNN
from benchmarks.gpu.rounds import image_rounds, ratio_of
from benchmarks.gpu.sections import Context

RUNS = 5
CONTENDERS = {"flash": FIRST, "cudnn": WITH_CUDNN}


def measure(context: Context) -> None:
    """A line whether both draw the same, a line a round, one that sums up."""
    if context.identity.stand_in:  # for cuDNN there is none
        context.log.measure("cudnn", lambda: {"skipped": "cuDNN has no stand-in; its engines were built"})
        return
    context.log.measure("equal", lambda: equal(context))
    openers = {name: partial(opened, context, bundle) for name, bundle in CONTENDERS.items()}
    rounds = image_rounds(context, RUNS, openers)
    context.log.conclude("ratio", lambda: asdict(ratio_of(rounds, "cudnn", "flash")))


def opened(context: Context, bundle: str) -> EngineContender:
    return contender_of(context.bundle(bundle))


def equal(context: Context) -> dict[str, Any]:
    """Relative error of every scale's logits, one kernel against the other."""
    flash, cudnn = (forced(context.bundle(found)) for found in CONTENDERS.values())
    return {"logits_relative_error": [relative_error(*pair) for pair in zip(cudnn.logits, flash.logits, strict=True)]}
