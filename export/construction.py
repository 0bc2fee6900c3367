"""What a build from a checkpoint and a rebuild from a bundle share: checks, engines into a bundle, and the report.

Knows graphs and engines, never a checkpoint: weights are names, shapes and roles here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.plan import GenerationPlan
from ..engines.bundle.bundle import BundleWriter
from ..engines.bundle.manifest import FileRecord
from ..engines.cache.engine_cache import EngineCache
from ..engines.spec import EngineSpec
from ..errors import PlanError
from ..families.base import TransformerShape
from .assembly import Assembly
from .factory import BuiltEngine, EngineFactory
from .models.common.step_graph import StepGraph
from .toolchain import Toolchain

WEIGHTS = "weights.safetensors"
Progress = Callable[[str, int, int], None]  # (what is being done, done, total)


@dataclass(frozen=True)
class BuildReport:
    """What a build did."""

    out: Path
    seconds: float
    graphs_traced: int
    graphs_cached: int  # engines taken from the cache whole
    trace_seconds: float  # added up over the workers
    compile_seconds: float
    step_engine_bytes: int  # without decoder and text encoder
    engine_bytes: int
    weight_bytes: int
    engines_copied: int = 0  # from the bundle that was rebuilt
    weights_linked: bool = False  # the weight file is the same file on the disk as that bundle's
    origin: tuple[str, ...] = ()  # which files the weights were read from, in plain words
    precision: str = ""  # what is computed in and why, in plain words


@dataclass
class Construction:
    """A bundle under construction: its engines, made in turn with progress told, and what that took."""

    writer: BundleWriter
    toolchain: Toolchain
    factory: EngineFactory
    progress: Progress | None
    total: int  # things to do
    started: float = field(default_factory=time.perf_counter)
    finished: int = 0

    def tell(self, what: str) -> None:
        """One more thing is done."""
        if self.progress is not None:
            self.progress(what, min(self.finished, self.total), self.total)
        self.finished += 1

    def make_engines(self, graphs: dict[str, StepGraph]) -> dict[str, EngineSpec]:
        """Make the engines of all graphs and store them."""
        built = self.factory.make(graphs, self.tell)
        return {name: self._store(name, engine) for name, engine in built.items()}

    def _store(self, name: str, built: BuiltEngine) -> EngineSpec:
        backend = self.toolchain.backend
        file, sha256, size = self.writer.add_engine(name, built.engine.engine, backend.suffix)
        return EngineSpec(
            name=name,
            file=file,
            sha256=sha256,
            size_bytes=size,
            inputs=built.engine.inputs,
            outputs=built.engine.outputs,
            weights=built.weights,
            backend=backend.name,
            target=self.toolchain.target,
            library_version=backend.version(),
            attentions=built.attentions,
            report=built.engine.report,
        )

    def report(
        self, out: Path, assembly: Assembly, engines: Mapping[str, EngineSpec], weights: FileRecord
    ) -> BuildReport:
        """What was done, when all of it is."""
        return BuildReport(
            out=out,
            seconds=time.perf_counter() - self.started,
            graphs_traced=self.factory.traced,
            graphs_cached=self.factory.cached,
            trace_seconds=self.factory.trace_seconds,
            compile_seconds=self.factory.compile_seconds,
            step_engine_bytes=sum(engines[name].size_bytes for name in assembly.step_graphs),
            engine_bytes=sum(engine.size_bytes for engine in engines.values()),
            weight_bytes=weights.size_bytes,
            precision=self.toolchain.told,
        )


def check_fit(plan: GenerationPlan, config: TransformerShape) -> None:
    """Refuse a schedule that is longer than the model's level embedding.

    Raises:
        PlanError: it is.
    """
    if len(plan.schedule) > config.max_scales:
        raise PlanError(
            f"the schedule has {len(plan.schedule)} scales",
            expected=f"at most {config.max_scales}, the level embeddings of this model",
            fix="choose a smaller size",
        )


def kept_in(cache: EngineCache | Path | bool) -> Path | None:
    """The folder of what is kept from build to build; None for nothing."""
    opened = open_cache(cache)
    return None if opened is None else opened.folder


def open_cache(cache: EngineCache | Path | bool) -> EngineCache | None:
    """The engine cache: the default folder for True, none for False."""
    if isinstance(cache, bool):
        return EngineCache() if cache else None
    return EngineCache(cache) if isinstance(cache, Path) else cache
