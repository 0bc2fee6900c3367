"""What is done to make one engine: trace its step module, compile the graph. Runs in any process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

from ..core.precision import Precision
from ..core.provenance import source_digest
from ..engines.base import ONNX, PROGRAM, Backend
from ..engines.cache.engine_cache import CachedEngine, EngineCache
from ..engines.registry import get_backend
from .models.common.step_graph import StepGraph, WeightShapes
from .tracing.onnx import TracedGraph, trace

PROGRAM_WORK = 8  # a program takes as long to compile as so many graphs to be traced to ONNX
# Which module of this package goes each way to an engine; any other way is that of tracing/torch_tensorrt.py.
TRACERS = {ONNX: "tracing.onnx", PROGRAM: "tracing.torch_export"}
GRAPH = "graph"  # stands for the backend in the key of a graph


@dataclass(frozen=True)
class BuildTask:
    """What a worker needs to make one engine. A graph that is in the cache is not traced again."""

    graph: StepGraph
    weights: WeightShapes
    precision: Precision
    backend: str
    target: str
    via: str = ONNX
    traced: TracedGraph | None = None

    @property
    def work(self) -> int:
        """What it takes about, in graphs traced to ONNX."""
        return PROGRAM_WORK if self.via == PROGRAM else int(self.traced is None)

    @property
    def has_graph(self) -> bool:
        """Whether there is a graph in between, which is kept by itself."""
        return self.via in TRACERS

    @property
    def graph_key(self) -> str:
        """Of the graph in the cache: all that decides it, the source of what makes it included."""
        return EngineCache.key(self._made, GRAPH, self.via, "")

    def engine_key(self, stamp: str) -> str:
        """Of the engine in the cache; `stamp` is its backend's."""
        return EngineCache.key(f"{self._made} via {self.via}", self.backend, self.target, stamp)

    @property
    def _made(self) -> str:
        tracer = f"{__package__}.{TRACERS.get(self.via, 'tracing.torch_tensorrt')}"
        return f"{self.graph.key(self.weights, self.precision)} {source_digest(__name__, tracer)}"

    def run(self) -> BuildResult:
        """Trace and compile."""
        start = time.perf_counter()
        if not self.has_graph:
            from .tracing.torch_tensorrt import compile_exported

            engine = compile_exported(self.graph.factory(**self.graph.arguments), self.weights, self.precision)
            return BuildResult(None, engine, 0.0, time.perf_counter() - start)
        traced = self.traced or self._traced()
        between = time.perf_counter()
        compiled = _backend(self.backend, self.target).build(traced.graph, self.target)
        engine = CachedEngine(compiled.engine, traced.inputs, traced.outputs, compiled.report)
        return BuildResult(traced, engine, between - start, time.perf_counter() - between)

    def _traced(self) -> TracedGraph:
        module = self.graph.factory(**self.graph.arguments)
        if self.via == ONNX:
            return trace(module, self.weights, self.precision)
        from .tracing.torch_export import trace_program

        return trace_program(module, self.weights, self.precision)


@dataclass(frozen=True)
class BuildResult:
    """An engine, the graph it was made from, and how long each took."""

    traced: TracedGraph | None  # None where no graph was in between
    engine: CachedEngine
    trace_seconds: float
    compile_seconds: float


@cache
def _backend(name: str, target: str) -> Backend:
    return get_backend(name, target=target)
