"""onnxruntime on the CPU: the embedded default, and the reference for every step graph.

An engine here is an ONNX graph, cleaned and rewritten for this library (rewriting.py). All sessions of a process share
one memory arena; which threads they have, threads.py says.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...core.dtypes import BY_ONNXRUNTIME, element_type
from ...core.platform import import_extra
from ...core.precision import Precision
from ...core.tensors import Launch, Scratch, TensorRef
from ...errors import BackendError, BuildError
from ..base import Backend, CompiledEngine, Engine, check_bindings, check_border
from ..device import Device, HostDevice
from ..onnx_graph import check_static, clean_graph
from ..scratch_estimates import Computation
from ..spec import EngineSpec, TensorSpec
from .estimates import library_bytes
from .needs import graph_needs
from .rewriting import rewritten
from .threads import choose_pool, join_shared_pool, shares_pool

TARGET = "cpu"
# What onnxruntime would log as an error it also raises, and fastvar reports: only log what it dies of.
_FATAL_ONLY = 4

# Blocks of 16 channels for convolutions whose weights are constants: here those are transforms of a single channel.
UNHELPFUL = ("NchwcTransformer",)

# Bytes of a free block that a smaller request may leave unused: by default nearly half of any block, and the arena of
# sessions that run side by side then grows for minutes.
MOST_WASTED = 1 << 20

_arena_lock = threading.Lock()
_has_arena = False


class OnnxRuntimeBackend(Backend):
    """onnxruntime's CPU execution provider.

    Args:
        threads: how many run an engine; by default one per usable core. Where all engines of the process share one
            pool (see threads.py), the first of them decides.

    Raises:
        BackendError: onnxruntime is not installed.
    """

    name = "onnxruntime"
    extra: ClassVar[str] = "onnxruntime"
    distributions: ClassVar[tuple[tuple[str, ...], ...]] = (("onnxruntime", "onnxruntime-gpu"),)
    summary: ClassVar[str] = "builds and runs on any CPU"
    device_targets: ClassVar[Mapping[str, str]] = {"cpu": TARGET}
    suffix: ClassVar[str] = ".onnx"
    native_code: ClassVar[bool] = False  # graphs of the library's own operators; no library of custom ones is loaded
    # fp16 runs by conversion, slower than fp32: to check 16-bit graphs with. Its CPU kernels know no bfloat16.
    precisions: ClassVar[tuple[str, ...]] = ("float32", "float16")

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise BackendError(f"{threads} threads", expected="at least 1")
        self._ort = import_extra("onnxruntime", "onnxruntime")
        self._threads = threads

    @classmethod
    def make(cls, threads: int | None, cache_folder: Path | None, target: str | None) -> OnnxRuntimeBackend:
        return cls(threads)

    @classmethod
    def library_bytes(cls, engines: Sequence[EngineSpec], computation: Computation, target: str) -> int:
        return library_bytes(engines, computation)

    @classmethod
    def runs_on_host(cls, target: str) -> bool:
        return True

    def keeps_threads_apart(self, threads: int) -> bool:
        return not shares_pool(_version_key(self.version()), threads)

    def version(self) -> str:
        return str(self._ort.__version__)

    def accepts(self, library_version: str) -> bool:
        """Graphs are portable: any version of the same major one may run them.

        What a graph asks for is in the graph, by IR version and operator sets, and the library says when it is loaded
        whether it has that.
        """
        built, running = _version_key(library_version), _version_key(self.version())
        return bool(built) and built[0] == running[0]

    def resolve_target(self, target: str | None, precision: Precision) -> str:
        self.check_precision(precision)
        if target not in (None, TARGET):
            raise BuildError(f"onnxruntime does not build for target {target!r}", expected=f"target {TARGET!r}")
        return TARGET

    def device(self) -> Device:
        return HostDevice()

    def build(self, graph: bytes, target: str = TARGET) -> CompiledEngine:
        """Check a graph, strip what the exporter noted in it (file names, stack traces), and load it once.

        Raises:
            BuildError: not a valid static graph, or onnxruntime rejects it.
        """
        engine = rewritten(clean_graph(graph))
        try:
            session = self._session(engine)
        except _library_errors(self._ort) as error:
            raise BuildError(f"onnxruntime {self.version()} rejects the graph: {error}") from error
        for tensor in (*session.get_inputs(), *session.get_outputs()):
            check_static(tensor.name, tensor.shape)
            _tensor_spec(tensor)
        return CompiledEngine(engine)

    def load(self, engine: bytes, spec: EngineSpec) -> OrtEngine:
        self.check(spec)
        try:
            session = self._session(engine)
        except _library_errors(self._ort) as error:
            raise self._refused(engine, spec, error) from error
        loaded = OrtEngine(self._ort, session, spec.name)
        check_border(spec, loaded.inputs, loaded.outputs)
        return loaded

    def _refused(self, engine: bytes, spec: EngineSpec, error: Exception) -> BackendError:
        """Why an engine is not loaded: a library of another version may lack what its graph asks for."""
        needs, built = graph_needs(engine), spec.library_version
        what = f"onnxruntime {self.version()} cannot load engine {spec.name!r}"
        if needs is None or built == self.version():
            return BackendError(f"{what}: {error}", fix="rebuild the bundle")
        return BackendError(
            f"{what}, built with {built}: {error}",
            expected=f"a version that knows {needs}",
            fix=f"install onnxruntime {built}, or rebuild the bundle",
        )

    def _session(self, engine: bytes) -> Any:
        _share_memory(self._ort)
        try:
            return self._session_of(engine)
        except _library_errors(self._ort) as error:
            if not join_shared_pool(error, self._threads):
                raise
            return self._session_of(engine)

    def _session_of(self, engine: bytes) -> Any:
        options = self._ort.SessionOptions()
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.execution_mode = self._ort.ExecutionMode.ORT_SEQUENTIAL
        # With a pattern, the second run would hold a block for all tensors beside what the first run left.
        options.enable_mem_pattern = False
        choose_pool(self._ort, _version_key(self.version()), self._threads, options)
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.log_severity_level = _FATAL_ONLY
        return self._ort.InferenceSession(
            engine,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(UNHELPFUL),
            enable_fallback=False,  # there is no other provider; it would print what it tries
        )


class OrtEngine(Engine):
    """One session; may be launched from several threads, each with its own prepared launch."""

    def __init__(self, ort: Any, session: Any, name: str) -> None:
        self.name = name
        self.inputs = tuple(_tensor_spec(tensor) for tensor in session.get_inputs())
        self.outputs = tuple(_tensor_spec(tensor) for tensor in session.get_outputs())
        self._session = session
        self._run_options = ort.RunOptions()
        self._run_options.log_severity_level = _FATAL_ONLY
        self._errors = _library_errors(ort)

    def prepare(self, tensors: Mapping[str, TensorRef], scratch: Scratch | None = None) -> Launch:
        check_bindings(self.name, tensors, self.inputs, self.outputs)
        binding = self._session.io_binding()
        for specs, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for spec in specs:
                element = _binding_type(spec.dtype)
                bind(spec.name, "cpu", 0, element, list(spec.shape), tensors[spec.name].address)
        session, options, errors = self._session, self._run_options, self._errors

        def launch() -> None:
            try:
                session.run_with_iobinding(binding, options)
            except errors as error:
                raise BackendError(f"onnxruntime failed while running engine {self.name!r}: {error}") from error

        return launch


def _share_memory(ort: Any) -> None:
    """Once per process: the arena that all sessions use.

    The arena doubles its regions: grown by exact requests instead, it kept a region for each size it ever saw.
    """
    global _has_arena
    with _arena_lock:
        if not _has_arena:
            memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, 0, -1, MOST_WASTED))
            _has_arena = True


def _library_errors(ort: Any) -> tuple[type[Exception], ...]:
    """What the library raises: its own classes have no base in common, and a failed run is a RuntimeError."""
    state = ort.capi.onnxruntime_pybind11_state
    own = (getattr(state, name) for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoModel"))
    rest = (getattr(state, name) for name in ("NotImplemented", "RuntimeException", "EPFail", "EngineError"))
    return (*own, *rest, RuntimeError, MemoryError)


def _version_key(version: str) -> tuple[int, ...]:
    """Numbers of a version for comparison; empty where it is none."""
    parts = version.split("+")[0].split(".")[:3]
    return tuple(int(p) for p in parts) if all(p.isdecimal() for p in parts) else ()


def _binding_type(dtype: str) -> Any:
    """onnxruntime binds by numpy type, and by ONNX number where numpy has none."""
    element = element_type(dtype)
    if element.storage != element.name:
        return element.onnx
    return importlib.import_module("numpy").dtype(element.storage).type


def _tensor_spec(tensor: Any) -> TensorSpec:
    if tensor.type not in BY_ONNXRUNTIME:
        raise BuildError(f"tensor {tensor.name!r} has type {tensor.type}", expected=", ".join(BY_ONNXRUNTIME))
    return TensorSpec(tensor.name, BY_ONNXRUNTIME[tensor.type].name, tuple(tensor.shape))
