"""How a benchmark of a bundle here is recorded: when, at what load, on what, and what was seen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastvar import Pipeline
from fastvar.core.files import write_text
from fastvar.errors import FastvarError
from fastvar.profiling.environment import environment

RESULTS = Path(__file__).parents[1] / "results"
PROMPT = "a small red circle on a white background"


def today() -> str:
    return datetime.now(timezone.utc).date().isoformat()


def record(bundle: Path, out: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure, and write that to a JSON file; gives what was measured. What the user can mend ends the process."""
    try:
        with Pipeline.load(bundle) as pipe:
            where = environment(pipe.manifest)
        load = os.getloadavg()[0]
        found = measure()
        head = {"date": today(), "load_before": load}
        write_text(out, json.dumps({**head, **found, "environment": where}, indent=2) + "\n")
    except FastvarError as error:
        sys.exit(f"error: {error}")
    return found
