"""One pipeline of the tiny model for the tests of this folder, and the image that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL.Image import Image

from fastvar import Pipeline
from tests.runtime.pipeline.drawing import PROMPT


@pytest.fixture(scope="session")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle)


@pytest.fixture(scope="session")
def image(pipe: Pipeline) -> Image:
    """The image that others are compared with."""
    return pipe(PROMPT, seed=7).images[0]
