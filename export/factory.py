"""From step graphs to engines: through the content-keyed cache, and what is not there traced by worker processes.

Workers are plain subprocesses that speak pickle over pipes: `multiprocessing` would import the caller's main module
again, which a script without a guard does not survive.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..engines.base import Backend
from ..engines.cache import CachedEngine, EngineCache
from ..engines.registry import get_backend
from ..errors import BuildError, FastvarError
from ..machine import usable_cores
from .graphs import StepGraph, layer_weights, trace
from .rows import Shapes
from .weights import WeightSource

# A worker spends seconds on importing torch; below this many graphs one process is faster.
GRAPHS_WORTH_A_WORKER = 8


@dataclass(frozen=True)
class BuildTask:
    """What a worker needs to make one engine."""

    graph: StepGraph
    weight_shapes: Shapes
    backend: str
    target: str

    def run(self) -> CachedEngine:
        """Trace and compile."""
        traced = trace(self.graph.factory(**self.graph.arguments), self.weight_shapes)
        return CachedEngine(get_backend(self.backend).build(traced.onnx, self.target), traced.inputs, traced.outputs)


@dataclass(frozen=True)
class BuiltEngine:
    """An engine and the weight-binding pattern of its inputs."""

    engine: CachedEngine
    weights: dict[str, str]


class EngineFactory:
    """Makes engines for one backend and target, and counts what was traced and what came from the cache."""

    def __init__(
        self,
        backend: Backend,
        target: str,
        cache: EngineCache | None,
        sources: dict[str, WeightSource],
        jobs: int | None = None,
    ) -> None:
        self.backend, self.target, self.cache, self.sources = backend, target, cache, sources
        self.jobs = jobs or usable_cores()
        self.traced = self.cached = 0

    def make(self, graphs: dict[str, StepGraph], done: Callable[[str], None]) -> dict[str, BuiltEngine]:
        """All engines by name, in the order given; `done` hears each name as it is ready."""
        engines: dict[str, CachedEngine] = {}
        bindings: dict[str, dict[str, str]] = {}
        missing: dict[str, tuple[BuildTask, str]] = {}
        for name, graph in graphs.items():
            module: Any = graph.factory(**graph.arguments)
            bindings[name] = graph.weight_binding(module)
            shapes = layer_weights(self.sources, bindings[name])
            key = self._key(graph, shapes)
            found = self.cache.get(key) if self.cache is not None else None
            if found is None:
                missing[name] = (BuildTask(graph, shapes, self.backend.name, self.target), key)
                continue
            engines[name] = found
            self.cached += 1
            done(name)
        for name, engine in self._build(missing):
            engines[name] = engine
            done(name)
        return {name: BuiltEngine(engines[name], bindings[name]) for name in graphs}

    def _key(self, graph: StepGraph, shapes: Shapes) -> str:
        return EngineCache.key(graph.key(shapes), self.backend.name, self.target, self.backend.version())

    def _build(self, missing: dict[str, tuple[BuildTask, str]]) -> Iterator[tuple[str, CachedEngine]]:
        workers = min(self.jobs, len(missing) // GRAPHS_WORTH_A_WORKER)
        with ThreadPoolExecutor(max(1, workers)) as pool, _runners(workers) as run:
            futures = {pool.submit(run, task): name for name, (task, _) in missing.items()}
            try:
                for future in as_completed(futures):
                    name, engine = futures[future], future.result()
                    self.traced += 1
                    if self.cache is not None:
                        self.cache.put(missing[name][1], engine)
                    yield name, engine
            finally:
                for future in futures:
                    future.cancel()


class Worker:
    """A subprocess that runs build tasks one after another."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[1])
        # Ctrl-C reaches the whole group: the parent answers it, and ends its workers itself.
        quiet = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
        code = f"{quiet}; import sys; sys.path[:] = {sys.path!r}; import {__name__} as f; f.serve()"
        command = [sys.executable, "-c", code]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)

    def run(self, task: BuildTask) -> CachedEngine:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            _send(self._process.stdin, task)
            result = _receive(self._process.stdout)
        except (OSError, EOFError) as error:
            raise BuildError(
                f"the worker that traced {task.graph.name} died with code {self._process.poll()}",
                fix="it may have run out of memory: build with --jobs 1",
            ) from error
        if isinstance(result, FastvarError):
            raise result
        if not isinstance(result, CachedEngine):
            raise RuntimeError(f"worker failed on {task.graph.name}:\n{result}")
        return result

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def _runners(workers: int) -> Iterator[Callable[[BuildTask], CachedEngine]]:
    """A function that runs a task: here for no or one worker, else in the calling thread's own subprocess."""
    if workers < 2:
        yield BuildTask.run
        return
    local, started = threading.local(), []

    def run(task: BuildTask) -> CachedEngine:
        if not hasattr(local, "worker"):
            local.worker = Worker()
            started.append(local.worker)
        result: CachedEngine = local.worker.run(task)
        return result

    try:
        yield run
    finally:
        for worker in started:
            worker.close()


def serve() -> None:
    """The worker's loop. Whatever libraries print goes to stderr: stdout carries the answers."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            task: BuildTask = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(answers, task.run())
        except FastvarError as error:
            _send(answers, error)
        except Exception:  # noqa: BLE001 handed to the parent whole, as the bug it is
            import traceback

            _send(answers, traceback.format_exc())


def _send(pipe: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    header = pipe.read(8)
    if len(header) < 8:
        raise EOFError
    return pickle.loads(pipe.read(int.from_bytes(header, "little")))
