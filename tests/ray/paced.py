"""Workers of Ray whose scales take as long as a file says; another file has a byte for every scale drawn."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("PACED", "."))
PACE, SCALES = FOLDER / "pace", FOLDER / "scales"


def install() -> None:
    """Called in every process that Ray starts for the tests."""
    from fastvar.serving.model import ServedModel

    tell = ServedModel._tell_scale

    def told(self: ServedModel, units: Any, event: Any) -> None:
        if event.image == 0:
            time.sleep(float(PACE.read_text()) if PACE.exists() else 0.0)
            with SCALES.open("ab") as handle:
                handle.write(b".")
        tell(self, units, event)

    ServedModel._tell_scale = told  # type: ignore[method-assign]  # slowed down
