"""From step graphs to engines: through the content-keyed cache, and what is not there traced by worker processes.

Workers are plain subprocesses that speak pickle over pipes: `multiprocessing` would import the caller's main module
again, which a script without a guard does not survive.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

from .. import lifeline
from ..engines.base import ONNX, PROGRAM, Backend
from ..engines.cache import CachedEngine, EngineCache
from ..engines.program_file import ProgramFile
from ..engines.registry import get_backend
from ..errors import BuildError, FastvarError
from ..lifeline import clean_up_when_terminated, end_all, read_frame, write_frame
from ..machine import usable_cores
from ..packages import needs_extra
from ..precision import Precision
from .graphs import StepGraph, TracedGraph, WeightShapes, layer_weights, stored_binding, trace
from .programs import border, constant_arrays, trace_program
from .toolchain import Toolchain
from .via_torch_tensorrt import VIA, compile_exported
from .weights import WeightSource

# A worker spends seconds on importing torch: what it must save, in graphs traced to ONNX.
WORTH_A_WORKER = 8
PROGRAM_WORK = 8  # a program takes as long to compile


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

    def run(self) -> BuildResult:
        """Trace and compile."""
        start = time.perf_counter()
        if self.via == VIA:
            engine = compile_exported(self.graph.factory(**self.graph.arguments), self.weights, self.precision)
            return BuildResult(None, engine, 0.0, time.perf_counter() - start)
        trace_form = trace_program if self.via == PROGRAM else trace
        traced = self.traced or trace_form(self.graph.factory(**self.graph.arguments), self.weights, self.precision)
        between = time.perf_counter()
        compiled = _backend(self.backend, self.target).build(traced.graph, self.target)
        engine = CachedEngine(compiled.engine, traced.inputs, traced.outputs, compiled.report)
        return BuildResult(traced, engine, between - start, time.perf_counter() - between)


@dataclass(frozen=True)
class BuildResult:
    """An engine, the graph it was made from, and how long each took."""

    traced: TracedGraph | None  # None where no graph was in between
    engine: CachedEngine
    trace_seconds: float
    compile_seconds: float


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
        graph = task.graph.key(task.weights, task.precision)
        return EngineCache.key(f"{graph} via {task.via}", task.backend, task.target, self.toolchain.backend.stamp())

    def _build(self, missing: dict[str, BuildTask]) -> Generator[tuple[str, CachedEngine], None, None]:
        tasks = {name: self._with_graph(task) for name, task in missing.items()}
        workers = min(self.jobs, sum(task.work for task in tasks.values()) // WORTH_A_WORKER)
        with closing(_run_here(tasks) if workers < 2 else _run_apart(tasks, workers)) as results:
            for name, result in results:
                self._count(tasks[name], result)
                yield name, result.engine

    def _with_graph(self, task: BuildTask) -> BuildTask:
        found = self.cache.get(_graph_key(task)) if self.cache is not None and task.via != VIA else None
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
            self.cache.put(_graph_key(task), CachedEngine(graph.graph, graph.inputs, graph.outputs))


def _graph_key(task: BuildTask) -> str:
    return EngineCache.key(task.graph.key(task.weights, task.precision), "graph", task.via, "")


@cache
def _backend(name: str, target: str) -> Backend:
    return get_backend(name, target=target)


class Worker:
    """A subprocess that runs build tasks one after another."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[1])
        # It listens before it imports torch: a parent that ends meanwhile ends it too.
        listen = f"import {lifeline.__name__} as l; orders = l.requests()"
        code = f"import sys; sys.path[:] = {sys.path!r}; {listen}; import {__name__} as f; f.serve(orders)"
        self.process = lifeline.start([sys.executable, "-c", code], root)

    def run(self, task: BuildTask) -> BuildResult:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            _send(self.process.stdin, task)
            result = _receive(self.process.stdout)
        except (OSError, EOFError) as error:
            raise BuildError(
                f"the worker that traced {task.graph.name} died with code {self.process.poll()}",
                fix="it may have run out of memory: build with --jobs 1",
            ) from error
        if isinstance(result, FastvarError):
            raise result
        if not isinstance(result, BuildResult):
            raise RuntimeError(f"worker failed on {task.graph.name}:\n{result}")
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


Results = Generator[tuple[str, BuildResult], None, None]


def _run_here(tasks: dict[str, BuildTask]) -> Results:
    """In the calling thread, so that a signal stops it."""
    for name, task in tasks.items():
        yield name, task.run()


def _run_apart(tasks: dict[str, BuildTask], workers: int) -> Results:
    """By workers, a thread for each, as they are ready."""
    with ThreadPoolExecutor(workers) as pool, _runners() as run:
        futures = {pool.submit(run, task): name for name, task in tasks.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def _runners() -> Iterator[Callable[[BuildTask], BuildResult]]:
    """A function that runs a task in the calling thread's own subprocess."""
    local, gate, started, ended = threading.local(), threading.Lock(), [], threading.Event()

    def run(task: BuildTask) -> BuildResult:
        with gate:  # none starts behind the back of who ends them
            if ended.is_set():
                raise RuntimeError("the build has ended")
            if not hasattr(local, "worker"):
                local.worker = Worker()
                started.append(local.worker)
        result: BuildResult = local.worker.run(task)
        return result

    try:
        yield run
    except BaseException:  # they may be at work
        with gate:
            ended.set()
        end_all([worker.process for worker in started])
        raise
    finally:
        for worker in started:
            worker.close()


def serve(orders: Iterable[bytes]) -> None:
    """The worker's loop. Whatever libraries print goes to stderr: stdout carries the answers."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    clean_up_when_terminated()
    for order in orders:
        try:
            task: BuildTask = pickle.loads(order)
            with needs_extra("export"):
                result = task.run()
            _send(answers, result)
        except FastvarError as error:
            _send(answers, error)
        except Exception:  # noqa: BLE001 handed to the parent whole, as the bug it is
            import traceback

            _send(answers, traceback.format_exc())


def _send(pipe: IO[bytes], value: Any) -> None:
    write_frame(pipe, pickle.dumps(value))


def _receive(pipe: IO[bytes]) -> Any:
    return pickle.loads(read_frame(pipe))
