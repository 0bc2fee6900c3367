"""Bundles of any family drawn for a measurement: with forced choices to compare them, and against the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.builder import GUIDED
from benchmarks.contenders import EngineContender
from benchmarks.timing import Run, forced_logits, one_image
from fastvar.core.plan import GenerationPlan
from fastvar.engines.bundle.bundle import Bundle
from fastvar.profiling.profiled_bundle import random_features
from fastvar.runtime.requests.inputs import LabelInput, draws_labels
from fastvar.runtime.requests.settings import SamplingSettings, default_settings

# Relative L2 error of the guided logits at any scale, against fp32 on the same choices.
TOLERANCES = {"bf16": 0.05, "fp16": 0.01}
PRECISION = "bf16"  # of the models that are timed
WARM_UP, RUNS = 2, 7
# Single launches first: where these are right and recorded ones are not, recording is to blame.
WAYS = {"graphs off": False, "graphs on": True}

Record = dict[str, Any]


@dataclass(frozen=True)
class Forced:
    """What a bundle makes of forced choices: logits of every scale, and the image [3, H, W]."""

    logits: Sequence[NDArray[Any]]
    image: NDArray[Any]


def forced(bundle: Bundle, cuda_graphs: bool = True, images: int = 1) -> Forced:
    """One image of random text features, or of the first class, of which every bit or code is forced; or a pass of so
    many equal ones, and the last of them decoded.
    """
    contender = contender_of(bundle, cuda_graphs, images)
    codes = getattr(bundle.manifest.transformer, "codes", 0)
    return Forced(forced_logits(contender, codes), contender.workspace.decode(images - 1).copy())


def contender_of(bundle: Bundle, cuda_graphs: bool = True, images: int = 1) -> EngineContender:
    """A bundle of any family, ready to draw."""
    manifest = bundle.manifest
    given = LabelInput(0) if draws_labels(manifest) else random_features(manifest)
    return EngineContender(bundle, given, settings_of(bundle), cuda_graphs=cuda_graphs, images=images)


def settings_of(bundle: Bundle) -> SamplingSettings:
    """Guidance is on; Infinity's random weights have no sampling of their own."""
    return GUIDED if bundle.manifest.family == "infinity" else default_settings(bundle.manifest)


def parity(expected: Forced, found: Forced, precision: str) -> Record:
    """Logits of every scale and the image, against those that are expected."""
    pairs = zip(found.logits, expected.logits, strict=True)
    errors = [relative_error(*pair) for pair in pairs]
    return {
        "ok": max(errors) <= TOLERANCES[precision],
        "logits_relative_error": errors,
        "image_relative_error": relative_error(found.image, expected.image),
        "tolerance": TOLERANCES[precision],
    }


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """L2 norm of the difference over that of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


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
