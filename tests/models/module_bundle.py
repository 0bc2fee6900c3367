"""A bundle whose engines are the step modules themselves, run in torch: nothing is traced or compiled."""

from __future__ import annotations

from pathlib import Path

from fastvar.core.plan import GenerationPlan
from fastvar.core.precision import Precision
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.bundle.weight_file import WeightFile
from fastvar.engines.registry import backend_class
from fastvar.engines.spec import EngineSpec
from fastvar.export.checkpoints.checkpoint import Checkpoint
from fastvar.export.checkpoints.weight_sources import engine_weights, preview_weights, write_sources
from fastvar.export.describe import describe
from fastvar.export.module_backend import ModuleBackend
from fastvar.export.options import BuildOptions
from fastvar.runtime.pipeline import Pipeline
from fastvar.runtime.session import Session


class ModuleBundle:
    """In place of engines/bundle/bundle.py's: a manifest, and a weight file in a folder."""

    digest = ""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: GenerationPlan,
        folder: Path,
        options: BuildOptions = BuildOptions(),  # noqa: B008  it is frozen
    ) -> None:
        self.path, precision = folder, Precision()
        self.manifest: Manifest = describe(checkpoint, plan, backend_class("onnxruntime"), precision, options)
        sources = engine_weights(checkpoint, options.with_encoder, precision) | preview_weights(checkpoint)
        write_sources(folder / self.manifest.weights.file, sources, precision)
        self.weights = WeightFile(folder / self.manifest.weights.file)
        self.kernel_folder = folder
        self._text_encoder = checkpoint.text_encoder

    def read_engine(self, spec: EngineSpec) -> bytes:
        return b""

    def is_current(self) -> bool:
        return True

    def session(self) -> Session:
        return Session(self, backend=self._backend())

    def pipeline(self) -> Pipeline:
        return Pipeline(self, backend=self._backend())

    def _backend(self) -> ModuleBackend:
        return ModuleBackend(self.manifest, self._text_encoder)
