"""The command, with images that take their time: every scale waits before it is told, and tests act in between."""

from __future__ import annotations

import os
import time
from typing import Any

from fastvar.cli import main
from fastvar.serving import server
from fastvar.serving.model import ServedModel
from fastvar.serving.options import ServeOptions

SECONDS = float(os.environ["PACE"])


def paced(tell: Any) -> Any:
    def told(self: ServedModel, units: Any, event: Any) -> None:
        time.sleep(SECONDS)
        tell(self, units, event)

    return told


def impatient(serve: Any) -> Any:
    """Time limits that a test can wait for."""

    def served(bundles: Any, options: ServeOptions, **more: Any) -> None:
        object.__setattr__(options, "patience", float(os.environ.get("PATIENCE", "30")))
        object.__setattr__(options, "heartbeat", 0.1)
        serve(bundles, options, **more)

    return served


if __name__ == "__main__":
    ServedModel._tell_scale = paced(ServedModel._tell_scale)  # type: ignore[method-assign]  # slowed down
    server.serve = impatient(server.serve)
    main()
