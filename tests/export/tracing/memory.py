"""What a text encoder's weights would take, and what a process took at most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config

from fastvar.core.precision import Precision
from fastvar.export.checkpoints.text_encoders import text_encoder_shapes
from fastvar.export.models.common.coders import TextEncoder, text_encoder_role
from fastvar.export.models.common.step_graph import WeightShape, WeightShapes

WEIGHT_BYTES = 256 << 20  # of the embedding of this encoder alone, in fp32
ENCODER = T5Config(
    vocab_size=1 << 17, d_model=512, d_kv=32, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
)


def text_encoder() -> tuple[Any, WeightShapes]:
    """A text encoder in fp32 that is small but for its embedding."""
    module, role = TextEncoder(ENCODER, 8), text_encoder_role(Precision())
    shapes = text_encoder_shapes(ENCODER)
    return module, {name: WeightShape(shapes[name], role(name)) for name in module.weights}


def growth(run: Callable[[], object]) -> int:
    """By how many bytes this process grew at most meanwhile."""
    process = Path("/proc/self")
    try:
        (process / "clear_refs").write_text("5")  # proc(5): resets the highest resident set to the current one
    except OSError:
        pytest.skip("this system does not count the memory of a part of a process")
    before = _resident(process, "VmHWM")
    run()
    return _resident(process, "VmHWM") - before


def _resident(process: Path, what: str) -> int:
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))
