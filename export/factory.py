"""From step graphs to engines: through the content-keyed cache, and what is not there made by workers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from ..core.platform import usable_cores
from ..engines.aotinductor.engine_file import ProgramFile
from ..engines.base import PROGRAM
from ..engines.cache.engine_cache import CachedEngine, EngineCache
from .models.common.step_graph import StepGraph, WeightShapes
from .models.common.weights import WeightSource
from .tasks import BuildResult, BuildTask
from .toolchain import Toolchain
from .tracing.onnx import TracedGraph, layer_weights, stored_binding
from .tracing.torch_export import border, constant_arrays
from .workers import run_apart, run_here

# A worker spends seconds on importing torch: what it must save, in graphs traced to ONNX.
WORTH_A_WORKER = 8


@dataclass(frozen=True)
class BuiltEngine:
    """An engine, the weight-binding pattern of its inputs, and the attentions of its graph."""

    engine: CachedEngine
    weights: dict[str, str]
    attentions: int


@dataclass(frozen=True)
class Order:
    """An engine to make: its step module, the task that compiles it, and the binding pattern of its weights."""

    module: Any
    task: BuildTask
    binding: dict[str, str]

    @property
    def attentions(self) -> int:
        return getattr(self.module, "attentions", 0)

    def fitted(self, engine: CachedEngine) -> CachedEngine:
        """The compiled engine for this very step: a program that serves others too is given the step's constants."""
        if self.task.via != PROGRAM:
            return engine
        taken, given = border(self.module, self.task.weights, self.task.precision)
        file = replace(ProgramFile.from_bytes(engine.engine), constants=constant_arrays(self.module))
        return CachedEngine(file.to_bytes(), taken, given, engine.report)


class EngineFactory:
    """Makes engines with one toolchain, and counts what was traced, compiled, and taken from the cache.

    Graphs are cached apart from engines: another target or library version compiles, and traces nothing.
    `trace_seconds` and `compile_seconds` add up what all workers spent.
    """

    def __init__(
        self,
        toolchain: Toolchain,
        cache: EngineCache | None,
        sources: dict[str, WeightSource],
        jobs: int | None = None,
    ) -> None:
        self.toolchain, self.cache, self.sources = toolchain, cache, sources
        self.jobs = jobs or usable_cores()
        self.traced = self.compiled = self.cached = 0
        self.trace_seconds = self.compile_seconds = 0.0

    def make(self, graphs: dict[str, StepGraph], done: Callable[[str], None]) -> dict[str, BuiltEngine]:
        """All engines by name, in the order given; `done` hears each name as it is ready. What is equal is made once.

        Raises:
            BuildError: a graph is rejected, or an attention was not fused and the toolchain insists.
        """
        wanted = {name: self._wanted(graph) for name, graph in graphs.items()}
        sharing: dict[str, list[str]] = {}
        for name, order in wanted.items():
            sharing.setdefault(self._key(order.task), []).append(name)
        engines: dict[str, CachedEngine] = {}

        def arrived(key: str, engine: CachedEngine) -> None:
            for name in sharing[key]:
                order = wanted[name]
                self.toolchain.check_fused(name, order.attentions, engine.report)
                engines[name] = order.fitted(engine)
                done(name)

        missing: dict[str, BuildTask] = {}
        for key, names in sharing.items():
            found = self.cache.get(key) if self.cache is not None else None
            if found is None:
                missing[key] = wanted[names[0]].task
                continue
            self.cached += len(names)
            arrived(key, found)
        with closing(self._build(missing)) as built:  # an interrupted build ends its workers before all else
            for key, engine in built:
                arrived(key, engine)
        return {name: BuiltEngine(engines[name], order.binding, order.attentions) for name, order in wanted.items()}

    def _wanted(self, graph: StepGraph) -> Order:
        module: Any = graph.factory(**graph.arguments)
        binding = graph.weight_binding(module)
        task = self._task(graph, layer_weights(self.sources, binding, graph.layer))
        return Order(module, task, stored_binding(binding, task.weights, task.precision))

    def _task(self, graph: StepGraph, weights: WeightShapes) -> BuildTask:
        tools = self.toolchain
        if tools.via == PROGRAM:  # one program serves all scales
            graph = graph.stand_in()
        return BuildTask(graph, weights, tools.precision, tools.backend.name, tools.target, tools.via)

    def _key(self, task: BuildTask) -> str:
        return task.engine_key(self.toolchain.backend.stamp())

    def _build(self, missing: dict[str, BuildTask]) -> Generator[tuple[str, CachedEngine], None, None]:
        tasks = {name: self._with_graph(task) for name, task in missing.items()}
        workers = min(self.jobs, sum(task.work for task in tasks.values()) // WORTH_A_WORKER)
        variables = self.toolchain.backend.build_environment(self.toolchain.target) if tasks else {}
        here = workers < 2 and not variables
        with closing(run_here(tasks) if here else run_apart(tasks, max(workers, 1), variables)) as results:
            for name, result in results:
                self._count(tasks[name], result)
                yield name, result.engine

    def _with_graph(self, task: BuildTask) -> BuildTask:
        found = self.cache.get(task.graph_key) if self.cache is not None and task.has_graph else None
        if found is None:
            return task
        return replace(task, traced=TracedGraph(found.engine, found.inputs, found.outputs))

    def _count(self, task: BuildTask, result: BuildResult) -> None:
        self.compiled += 1
        self.compile_seconds += result.compile_seconds
        if self.cache is not None:
            self.cache.put(self._key(task), result.engine)
        if task.traced is not None or result.traced is None:
            return
        self.traced += 1
        self.trace_seconds += result.trace_seconds
        if self.cache is not None:
            graph = result.traced
            self.cache.put(task.graph_key, CachedEngine(graph.graph, graph.inputs, graph.outputs))
