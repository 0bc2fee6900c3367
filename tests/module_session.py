"""A session whose engines are step modules run in torch: all of the runtime, with nothing traced or compiled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fastvar.engines.bundle import Bundle
from fastvar.engines.registry import backend_class
from fastvar.export.build import _write_weights
from fastvar.export.checkpoint import Checkpoint
from fastvar.export.describe import describe
from fastvar.export.module_backend import ModuleBackend
from fastvar.export.sources import engine_weights
from fastvar.plan import GenerationPlan
from fastvar.precision import Precision
from fastvar.runtime.session import Session


def module_session(checkpoint: Checkpoint, plan: GenerationPlan, folder: Path, rows: int = 2) -> Session:
    """fp32, for one number of guidance rows. A checkpoint with a text encoder needs a bundle."""
    precision = Precision()
    manifest = describe(checkpoint, plan, backend_class("onnxruntime"), precision, rows=(rows,))
    _write_weights(folder / manifest.weights.file, engine_weights(checkpoint, False, precision), precision)
    bundle: Any = SimpleNamespace(manifest=manifest, path=folder, read_engine=lambda _: b"")
    return Session(cast(Bundle, bundle), backend=ModuleBackend(manifest))
