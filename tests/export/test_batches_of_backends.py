"""Images of a pass against the same images alone, on compiled engines: the tolerance that the guide states.

Tokens are forced, so that a last bit in one scale decides nothing in the next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fastvar.core.noise import Noise
from fastvar.engines.bundle.bundle import Bundle
from fastvar.export.build import build_bundle
from fastvar.export.options import BuildOptions
from fastvar.runtime.conditioning import TextFeatures
from fastvar.runtime.editing.given_tokens import FORCE_ONE, FORCE_ZERO
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from tests.export.test_batches import CASES, features

TOLERANCE = {"onnxruntime": 2e-5, "aotinductor": 2e-5}  # of logits, fp32


def forcing(image: int) -> Noise:
    """Bits of an image's own, drawn by nobody."""

    def noise(scale: int, shape: tuple[int, ...]) -> NDArray[Any]:
        rng = np.random.default_rng((image, scale))
        return np.where(rng.random(shape) < 0.5, FORCE_ONE, FORCE_ZERO).astype(np.float32)

    return noise


def logits_of(session: Session, images: list[int], guided: bool) -> list[list[NDArray[Any]]]:
    """Of every image, scale by scale."""
    workspace = session.workspace(2 if guided else 1, len(images))
    workspace.give_features([features(session.manifest, image) for image in images])
    settings = [SamplingSettings(2.0 + image if guided else 1.0, 0.6 + 0.1 * image, 0.9) for image in images]
    found: list[list[NDArray[Any]]] = [[] for _ in images]
    for calls, _ in workspace.run_scales([forcing(image) for image in images], settings):
        logits = workspace.read(calls.sampling_head, "logits")
        for place, own in enumerate(found):
            own.append(logits.reshape(-1, len(images), logits.shape[-1])[:, place].copy())
    return found


def assert_alike(session: Session, sizes: tuple[int, ...], tolerance: float, guidance: tuple[bool, ...]) -> None:
    for guided in guidance:
        alone = [logits_of(session, [image], guided)[0] for image in range(max(sizes))]
        for count in sizes:
            images = list(range(count))[::-1]
            for image, found in zip(images, logits_of(session, images, guided), strict=True):
                for one, other in zip(found, alone[image], strict=True):
                    np.testing.assert_allclose(one, other, atol=tolerance, rtol=tolerance)


def test_onnxruntime(batched_bundle: Path):
    session = Session(Bundle.open(batched_bundle), threads=1)
    assert isinstance(features(session.manifest, 0), TextFeatures)
    assert_alike(session, (2, 4), TOLERANCE["onnxruntime"], (True, False))


@pytest.mark.slow
def test_aotinductor(tmp_path: Path, engine_cache: Path):
    """Pruned, and without guidance at the end: rows of both numbers in one generation."""
    case, out = CASES["infinity-guidance-ends"], tmp_path / "bundle"
    options = BuildOptions(backend="aotinductor", precision="fp32", guidance="on", batch=(2,))
    build_bundle(case.checkpoint(), case.plan, out, options, cache=engine_cache)
    assert_alike(Session(Bundle.open(out), threads=1), (2,), TOLERANCE["aotinductor"], (True,))
