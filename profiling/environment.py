"""The hardware and the versions that a measured figure needs beside it."""

from __future__ import annotations

from typing import Any

from ..doctor import examine
from ..engines.bundle.manifest import Manifest

FACTS = ("fastvar", "python", "platform", "cpu", "cpu_cores", "cpu_features", "memory_bytes")


def environment(manifest: Manifest) -> dict[str, Any]:
    """Ready for json.dumps: the machine, the backend with its version, target and precision."""
    facts, engine = examine(), manifest.any_engine
    return {
        **{name: facts[name] for name in FACTS},
        "backend": f"{engine.backend} {engine.library_version}",
        "target": engine.target,
        "precision": manifest.precision.label,
    }
