"""Section "truth": whether the GPU computes what onnxruntime computes in fp32 on the CPU, on equal forced choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.builder import GUIDED
from benchmarks.contenders import EngineContender
from benchmarks.gpu.recipes import DEMO_PRECISIONS
from benchmarks.gpu.sections import Context
from benchmarks.timing import forced_logits
from fastvar.engines.bundle.bundle import Bundle
from fastvar.profiling.profiled_bundle import random_features
from fastvar.runtime.inputs import LabelInput, draws_labels
from fastvar.runtime.settings import SamplingSettings, default_settings

# Relative L2 error of the guided logits at any scale, against fp32 on the same choices.
TOLERANCES = {"bf16": 0.05, "fp16": 0.01}
# Single launches first: where these are right and recorded ones are not, recording is to blame.
WAYS = {"graphs off": False, "graphs on": True}


@dataclass(frozen=True)
class Forced:
    """What a bundle makes of forced choices: logits of every scale, and the image [3, H, W]."""

    logits: Sequence[NDArray[Any]]
    image: NDArray[Any]


def measure(context: Context) -> None:
    """The demo in every precision, without CUDA graphs and with them."""
    expected = forced(context.bundle("demo-cpu"))
    for precision in DEMO_PRECISIONS:
        for way, graphs in WAYS.items():
            context.log.measure(
                f"{precision}, {way}",
                lambda precision=precision, graphs=graphs: parity(
                    expected, forced(context.bundle(f"demo-{precision}"), graphs), precision
                ),
            )


def forced(bundle: Bundle, cuda_graphs: bool = True) -> Forced:
    """One image of random text features, or of the first class, of which every bit or code is forced."""
    contender = contender_of(bundle, cuda_graphs)
    codes = getattr(bundle.manifest.transformer, "codes", 0)
    return Forced(forced_logits(contender, codes), contender.workspace.decode().copy())


def contender_of(bundle: Bundle, cuda_graphs: bool = True) -> EngineContender:
    """A bundle of any family, ready to draw."""
    manifest = bundle.manifest
    given = LabelInput(0) if draws_labels(manifest) else random_features(manifest)
    return EngineContender(bundle, given, settings_of(bundle), cuda_graphs=cuda_graphs)


def settings_of(bundle: Bundle) -> SamplingSettings:
    """Guidance is on; Infinity's random weights have no sampling of their own."""
    return GUIDED if bundle.manifest.family == "infinity" else default_settings(bundle.manifest)


def parity(expected: Forced, found: Forced, precision: str) -> dict[str, Any]:
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
