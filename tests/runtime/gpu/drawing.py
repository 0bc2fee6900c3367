"""What tests on the fake GPU draw, and what they reckon with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from PIL.Image import Image

from fastvar import Pipeline
from fastvar.engines.bundle.manifest import Manifest
from fastvar.runtime.memory.fit import device_need
from fastvar.runtime.memory.layout import build_layout
from tests.fakes.cuda import FakeDriver

PROMPT = "a red circle above a blue square"
SCALES = 3
WAIT, GRAPH = "cuStreamSynchronize", "cuGraphLaunch"
DRAWINGS = [
    {"seed": 7},
    {"seed": 8, "tau": 0.5, "top_p": 0.5},
    {"seed": 7, "guidance_scale": 1},
    {"seed": 7, "negative_prompt": "a white square"},
    {"seed": 2, "num_images": 2},
]


def scratch_of(engine: str) -> int:
    """Every engine another size, and some none."""
    return int.from_bytes(hashlib.sha256(engine.encode()).digest()[:2], "little") % 5 * 10_000


Load = Callable[..., tuple[Pipeline, FakeDriver]]


def pixels(images: list[Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def needed(manifest: Manifest, offload: bool = False) -> int:
    layouts = [build_layout(manifest, *s.batch, offload_text_encoder=offload) for s in manifest.sets]
    return device_need(layouts).total_bytes
