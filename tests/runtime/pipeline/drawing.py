"""How tests of the pipeline draw, and what they look at."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from PIL.Image import Image

from fastvar import Pipeline
from fastvar.core.noise import uniform_noise
from fastvar.runtime.requests.inputs import TextInput
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session

PROMPT = "a red circle above a blue square"
SCALES = [(0, (1, 1), 1, 1), (2, (4, 4), 16, 16), (6, (16, 16), 256, 128)]  # index, size, tokens, kept


def pixels(image: Image) -> bytes:
    assert image.mode == "RGB"
    return image.tobytes()


class StoppedError(Exception):
    """Ends a generation from its callback."""


def previews(pipe: Pipeline, **settings: object) -> list[bytes]:
    """Every scale of a generation, without the decoder."""
    settings.setdefault("seed", 0)
    return [event.preview().tobytes() for event in pipe.stream(settings.pop("prompt", PROMPT), **settings)]


def codes(pipe: Pipeline, rows: int, guidance_scale: float, seed: int = 7) -> list[np.ndarray]:
    """Summed codes after each scale, on engines for that number of rows."""
    workspace = Session(pipe.bundle).workspace(rows)
    workspace.give(TextInput(pipe._reader.subjects.tokenizer.encode(PROMPT)))
    settings = SamplingSettings(guidance_scale, 1.0, 0.97)
    steps = workspace.run_scales(lambda scale, shape: uniform_noise(seed, scale, shape), settings)
    return [workspace.summed_codes(calls).copy() for calls, _ in steps]


def in_threads(jobs: list[Callable[[], object]]) -> list[object]:
    """Run jobs at once, started together."""
    results: list[object] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def run(position: int) -> None:
        start.wait()
        results[position] = jobs[position]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "deadlock"
    return results
