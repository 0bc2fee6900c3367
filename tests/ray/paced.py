"""Workers of Ray whose scales take as long as a file says; other files have a byte for every scale and pass drawn."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def folder() -> Path:
    return Path(os.environ["PACED"])


def pace() -> Path:
    """Seconds of a scale."""
    return folder() / "pace"


def scales() -> Path:
    """A byte for every scale of every pass that was served."""
    return folder() / "scales"


def passes(address: str) -> Path:
    """A byte for every pass of a batch that a machine has drawn."""
    return folder() / f"passes-{address}"


def install() -> None:
    """Called in every process that Ray starts for the tests."""
    from fastvar.serving.model import ServedModel

    tell = ServedModel._tell_scale

    def told(self: ServedModel, units: Any, event: Any) -> None:
        if event.image == 0:
            time.sleep(float(pace().read_text()) if pace().exists() else 0.0)
            with scales().open("ab") as handle:
                handle.write(b".")
        tell(self, units, event)

    ServedModel._tell_scale = told  # type: ignore[method-assign]  # slowed down
