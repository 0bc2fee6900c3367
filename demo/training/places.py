"""Where the training of the demo model keeps its state, and where it writes its checkpoint."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
STATES = Path(os.environ.get("FASTVAR_DEMO_STATE", ROOT / "out" / "training"))
CHECKPOINT = STATES / "checkpoint"  # in the official layout, as demo/checkpoint
TEXT_ENCODER = CHECKPOINT / "text_encoder"
CURVES = STATES / "curves"  # a CSV for every stage
