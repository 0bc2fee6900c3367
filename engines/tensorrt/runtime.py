"""TensorRT engines on a GPU: one execution context each, on scratch memory and addresses of the caller.

An execution context is bound anew before every launch: one engine serves all layers, and a recorded step keeps the
addresses of the time of recording.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from ...core.tensors import Launch, Scratch, TensorRef
from ...errors import BackendError, BundleError, InternalError
from ..base import Engine, check_bindings, check_border
from ..cache.engine_cache import read_shared, save_shared
from ..spec import EngineSpec, TensorSpec
from .build_log import BuildLog, listening_logger
from .cuda_device import CudaDevice

_log = logging.getLogger(__name__)

# TensorRT's name of an element type -> ours.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


class EngineLoader:
    """Loads plans for one device, and keeps the kernels that TensorRT-RTX finishes on the GPU.

    Without `cache_folder` none are kept. The file is named by library and GPU; the library rejects kernels of others.
    """

    def __init__(self, trt: Any, device: CudaDevice, cache_folder: Path | None, stamp: str) -> None:
        self._trt, self._device = trt, device
        self._messages = BuildLog(only_errors=True)
        self._logger = listening_logger(trt, self._messages)
        self._runtime = trt.Runtime(self._logger)
        gpu = device.gpu_facts()
        name = "".join(c if c.isalnum() else "-" for c in gpu.name.lower())
        self._kernel_file = cache_folder / f"{stamp}-{gpu.capability}-{name}.kernels" if cache_folder else None
        self._kernels: Any = None
        self._saved = b""

    def load(self, plan: bytes, spec: EngineSpec) -> TrtEngine:
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(
                f"engine {spec.name!r} is not accepted by this GPU: {self._messages.reason()}",
                fix="rebuild the bundle on or for this machine",
            )
        context = engine.create_execution_context(self._configuration(engine))
        if context is None:
            raise BackendError(f"engine {spec.name!r} cannot be set up: {self._messages.reason()}")
        return TrtEngine(self._device, engine, context, spec, self._messages)

    def _configuration(self, engine: Any) -> Any:
        trt = self._trt
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._kernel_file is not None and hasattr(config, "create_runtime_cache"):
            if self._kernels is None:
                self._kernels = config.create_runtime_cache()
                blob = read_shared(self._kernel_file)
                if blob and not self._kernels.deserialize(blob):
                    _log.warning("%s is of another driver or GPU and will be made anew", self._kernel_file)
                    blob = b""
                self._saved = blob
            config.set_runtime_cache(self._kernels)
        return config

    def save_kernels(self) -> None:
        """Write the kernels to `cache_folder`, where some were compiled since the last call."""
        if self._kernels is None or self._kernel_file is None:
            return
        blob = bytes(self._kernels.serialize())
        if blob != self._saved:
            save_shared(self._kernel_file, blob)
            self._saved = blob


class TrtEngine(Engine):
    """An engine with one execution context, which is enough: launches of one device follow each other."""

    def __init__(self, device: CudaDevice, engine: Any, context: Any, spec: EngineSpec, messages: BuildLog) -> None:
        self.name = spec.name
        self._device, self._engine, self._context, self._messages = device, engine, context, messages
        self._lock = Lock()
        self.scratch_bytes = int(engine.device_memory_size_v2)
        self.inputs, self.outputs = _borders(engine)
        check_border(spec, self.inputs, self.outputs)

    def prepare(self, tensors: Mapping[str, TensorRef], scratch: Scratch | None = None) -> Launch:
        check_bindings(self.name, tensors, self.inputs, self.outputs)
        held = scratch.size_bytes if scratch is not None else 0
        if held < self.scratch_bytes:
            raise InternalError(f"engine {self.name!r} needs {self.scratch_bytes} bytes of scratch, it is given {held}")
        addresses = [(name, ref.address) for name, ref in tensors.items()]
        context, stream = self._context, self._device.stream_address

        def launch() -> None:
            with self._lock:
                if scratch is not None:
                    context.set_device_memory(scratch.address, scratch.size_bytes)
                bound = all(context.set_tensor_address(name, address) for name, address in addresses)
                if not (bound and context.execute_async_v3(stream)):
                    raise BackendError(f"engine {self.name!r} does not run: {self._messages.reason()}")

        return launch


def _borders(engine: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and the outputs of an engine."""
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for position in range(engine.num_io_tensors):
        name = engine.get_tensor_name(position)
        kind, dtype = engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise BundleError(f"tensor {name!r} has type {dtype}", expected=f"one of {', '.join(_DTYPES)}")
        side = inputs if kind == "INPUT" else outputs
        side.append(TensorSpec(name, _DTYPES[dtype], tuple(engine.get_tensor_shape(name))))
    return tuple(inputs), tuple(outputs)
