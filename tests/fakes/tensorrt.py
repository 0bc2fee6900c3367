"""A TensorRT library whose plans are ONNX graphs: run by onnxruntime, on the memory and in the order of a fake GPU.

Strict where the real library is: addresses and scratch memory must be aligned, a context must be current, and scratch
memory is left full of garbage.
"""

# ruff: noqa: N802  the library's own names

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime

from fastvar.core.dtypes import size_bytes
from fastvar.core.tensors import TensorRef
from fastvar.engines.bundle.bundle import Bundle, BundleWriter
from fastvar.engines.device import ALIGNMENT
from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend, OrtEngine
from fastvar.engines.spec import EngineReport, EngineSpec
from fastvar.engines.tensorrt import backend as tensorrt
from fastvar.engines.tensorrt.cuda_device import CudaDevice
from fastvar.errors import FastvarError
from tests.fakes.cuda import FakeDriver
from tests.fakes.cuda_gpu import GARBAGE, fill

VERSION = "1.7.1.116"
TARGET = "sm86"
MAGIC = b"fake plan\n"
SCRATCH_DIGITS = 8  # bytes of the number that follows
Sizes = int | Callable[[str], int]


def plan_of(graph: bytes, scratch_bytes: int = 0) -> bytes:
    """What the library would build from an ONNX graph."""
    return MAGIC + scratch_bytes.to_bytes(SCRATCH_DIGITS, "little") + graph


@cache
def loaded(graph: bytes) -> OrtEngine:
    """The graph in onnxruntime; once per process, whatever the number of fake GPUs."""
    return OrtEngine(onnxruntime, OnnxRuntimeBackend()._session(graph), "fake")


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        """For the one who listens."""


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8


NAMES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "bfloat16": DataType.BF16,
    "float8_e4m3fn": DataType.FP8,
    "int64": DataType.INT64,
    "int32": DataType.INT32,
    "int8": DataType.INT8,
    "uint8": DataType.UINT8,
    "bool": DataType.BOOL,
}


class FakeTensorRT:
    """The module.

    `plans` is what it was asked to load, `compiled` how many plans it had to finish on the GPU. `environment` is what
    a kernel cache is bound to. With `refuses` set, nothing runs; with `no_contexts`, no engine can be set up.
    """

    __version__ = VERSION
    ILogger = ILogger
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    TensorIOMode = TensorIOMode
    DataType = DataType

    def __init__(self, driver: FakeDriver, environment: str = "driver 13.0") -> None:
        self.driver, self.environment = driver, environment
        self.plans: list[bytes] = []
        self.compiled = 0
        self.refuses = ""
        self.no_contexts = False

    def Runtime(self, logger: ILogger) -> Runtime:
        return Runtime(self, logger)


class Runtime:
    def __init__(self, library: FakeTensorRT, logger: ILogger) -> None:
        self._library, self._logger = library, logger

    def deserialize_cuda_engine(self, plan: bytes) -> CudaEngine | None:
        self._library.plans.append(bytes(plan))
        if not self._library.driver.has_context():
            self._logger.log(Severity.ERROR, "no CUDA context is current")
            return None
        start = len(MAGIC) + SCRATCH_DIGITS
        if not plan.startswith(MAGIC):
            self._logger.log(Severity.ERROR, "the plan's magic tag does not match")
            return None
        scratch_bytes = int.from_bytes(plan[len(MAGIC) : start], "little")
        return CudaEngine(self._library, self._logger, loaded(plan[start:]), plan, scratch_bytes)


class CudaEngine:
    def __init__(
        self, library: FakeTensorRT, logger: ILogger, engine: OrtEngine, plan: bytes, scratch_bytes: int
    ) -> None:
        self.library, self.logger, self.engine = library, logger, engine
        self.digest = hashlib.sha256(plan).hexdigest()
        self.device_memory_size_v2 = scratch_bytes
        self.modes = dict.fromkeys((t.name for t in engine.inputs), TensorIOMode.INPUT)
        self.modes |= dict.fromkeys((t.name for t in engine.outputs), TensorIOMode.OUTPUT)
        self.specs = {t.name: t for t in (*engine.inputs, *engine.outputs)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.specs)

    def get_tensor_name(self, position: int) -> str:
        return list(self.specs)[position]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.modes[name]

    def get_tensor_dtype(self, name: str) -> DataType:
        return NAMES[self.specs[name].dtype]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.specs[name].shape

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.library)

    def create_execution_context(self, config: RuntimeConfig) -> ExecutionContext | None:
        if self.library.no_contexts or not self.library.driver.has_context():
            self.logger.log(Severity.ERROR, "the context cannot be made")
            return None
        kernels = config.cache.kernels if config.cache is not None else set()
        if self.digest not in kernels:
            self.library.compiled += 1
            kernels.add(self.digest)
        if config.strategy != ExecutionContextAllocationStrategy.USER_MANAGED:
            self.library.driver.cuMemAlloc(max(self.device_memory_size_v2, 1))
        return ExecutionContext(self)


class RuntimeConfig:
    def __init__(self, library: FakeTensorRT) -> None:
        self._library = library
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._library.environment)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """Digests of the plans whose kernels are finished, bound to an environment."""

    def __init__(self, environment: str) -> None:
        self._environment = environment
        self.kernels: set[str] = set()

    def serialize(self) -> memoryview:
        return memoryview("\n".join((self._environment, *sorted(self.kernels))).encode())

    def deserialize(self, blob: bytes) -> bool:
        environment, *kernels = blob.decode(errors="replace").split("\n")
        if environment != self._environment:
            return False
        self.kernels.update(kernels)
        return True


class ExecutionContext:
    def __init__(self, engine: CudaEngine) -> None:
        self._engine, self._addresses = engine, dict[str, int]()
        self._scratch = (0, 0)

    def set_device_memory(self, address: int, size: int) -> None:
        self._scratch = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.specs or address % ALIGNMENT:
            return self._error(f"tensor {name} cannot be at {address:#x}")
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        """Enqueue, with the addresses as they are now."""
        engine, library = self._engine, self._engine.library
        address, size = self._scratch
        if library.refuses:
            return self._error(library.refuses)
        if not library.driver.has_context():
            return self._error("no CUDA context is current")
        if self._addresses.keys() != engine.specs.keys():
            return self._error("not every tensor has an address")
        if size < engine.device_memory_size_v2 or address % ALIGNMENT:
            return self._error("scratch memory is too small, or not aligned")
        bound = {name: TensorRef(a, *self._form(name)) for name, a in self._addresses.items()}
        run = engine.engine.prepare(bound)
        touched = [(ref.address, size_bytes(ref.dtype, ref.shape)) for ref in bound.values()]
        if size:
            touched.append((address, size))

        def work() -> None:
            if size:
                fill(address, size, GARBAGE)
            run()

        library.driver.enqueue(stream, work, tuple(touched))
        return True

    def _form(self, name: str) -> tuple[str, tuple[int, ...]]:
        spec = self._engine.specs[name]
        return spec.dtype, spec.shape

    def _error(self, message: str) -> bool:
        self._engine.logger.log(Severity.ERROR, message)
        return False


class FakeBackend(tensorrt.TensorRTRTXBackend):
    """TensorRT-RTX on a fake GPU."""

    def __init__(
        self,
        driver: FakeDriver | None = None,
        cache_folder: Path | None = None,
        library: FakeTensorRT | None = None,
    ) -> None:
        self.driver = driver or FakeDriver()
        self.library = library or FakeTensorRT(self.driver)
        with mock.patch.object(tensorrt, "import_extra", return_value=self.library):
            super().__init__(cache_folder)

    def device(self) -> CudaDevice:
        if self._device is None:
            self._device = CudaDevice(self.needs_cuda, self.driver)
        return self._device


def gpu_spec(spec: EngineSpec, **changes: Any) -> EngineSpec:
    """The engine's entry in the manifest, if it had been built for the fake GPU."""
    return replace(spec, **{"backend": "tensorrt-rtx", "target": TARGET, "library_version": VERSION, **changes})


def fake_gpu_bundle(
    source: Path,
    out: Path,
    scratch_bytes: Sizes = 0,
    wanted_bytes: Sizes | None = None,
    alignment: int = FakeBackend.address_alignment,
) -> Path:
    """A bundle of onnxruntime engines, copied as one for the fake GPU.

    `scratch_bytes` is what the manifest says an engine needs, by its name; `wanted_bytes` what it wants when loaded,
    the same by default.
    """
    bundle, wanted_bytes = Bundle.open(source), scratch_bytes if wanted_bytes is None else wanted_bytes
    manifest = bundle.manifest
    with BundleWriter(out) as writer:
        engines: dict[str, EngineSpec] = {}
        for name, spec in manifest.engines.items():
            plan = plan_of(bundle.read_engine(spec), _size(wanted_bytes, name))
            data = lzma.compress(plan, preset=tensorrt.PACKING)
            file, sha256, size = writer.add_engine(name, data, FakeBackend.suffix)
            report = EngineReport(_size(scratch_bytes, name))
            engines[name] = gpu_spec(spec, file=file, sha256=sha256, size_bytes=size, report=report)
        for record in (manifest.weights, manifest.text_tokenizer):
            if record is None:
                raise FastvarError("a bundle with a tokenizer is expected")
            writer.add_file(source / record.file, record.file)
        writer.commit(replace(manifest, engines=engines, address_alignment=alignment))
    return out


def _size(sizes: Sizes, name: str) -> int:
    return sizes if isinstance(sizes, int) else sizes(name)
