"""An NVIDIA GPU through the CUDA driver API (cuda-python): one stream, pinned staging, recorded graphs.

Host values go through a ring of pinned buffers, so that `write` returns before the copy is done and the caller may
change the values. Only `read`, `wait` and a full ring wait for the GPU.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.dtypes import size_bytes, storage_dtype
from ...core.platform import import_extra
from ...core.tensors import Launch, TensorRef
from ...errors import BackendError, DeviceMemoryError
from ..device import Allocation, Device, GpuFacts, host_array, not_recorded

_log = logging.getLogger(__name__)

STAGING_BUFFERS = 4
STAGING_BYTES = 16 << 20
NO_DRIVER = "no NVIDIA driver is installed here, and these engines run on an NVIDIA GPU"


class CudaError(BackendError):
    """The driver refused a call."""


class CudaDriver:
    """Driver calls, checked, in the primary context of the first visible GPU.

    Raises:
        BackendError: the NVIDIA driver is missing or too old, or no GPU is visible.
    """

    def __init__(self, module: Any, needs_cuda: tuple[int, int]) -> None:
        self.module = module
        self._entered = local()
        _start(module)
        self._require(needs_cuda)
        self.device = self._checked("cuDeviceGet", 0)
        self._context = self._checked("cuDevicePrimaryCtxRetain", self.device)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a driver function; returns its values without the code.

        Raises:
            CudaError: the code is not success.
        """
        if not getattr(self._entered, "done", False):  # every thread has its own current context
            self._checked("cuCtxSetCurrent", self._context)
            self._entered.done = True
        return self._checked(function, *arguments)

    def own(self, owner: object, function: str, handle: Any) -> None:
        """Release a resource when its owner goes; at the end of the process the driver releases all."""
        weakref.finalize(owner, self._release, function, handle).atexit = False

    def _release(self, function: str, handle: Any) -> None:
        """The failure of a GPU is reported by the call that met it, and not again by every resource released."""
        try:
            self.call(function, handle)
        except CudaError as error:
            _log.debug("%s", error)

    def newest_cuda(self) -> tuple[int, int]:
        """The newest CUDA version, (major, minor), that the installed driver runs."""
        version = int(self._checked("cuDriverGetVersion"))
        return version // 1000, version % 1000 // 10

    def _checked(self, function: str, *arguments: Any) -> Any:
        return checked(self.module, function, *arguments)

    def _require(self, needs_cuda: tuple[int, int]) -> None:
        found = self.newest_cuda()
        if found < needs_cuda:
            raise BackendError(
                f"the NVIDIA driver is too old: it runs CUDA {found[0]}.{found[1]}",
                expected=f"a driver for CUDA {needs_cuda[0]}.{needs_cuda[1]} or newer",
                fix="update the NVIDIA driver",
            )


def checked(module: Any, function: str, *arguments: Any) -> Any:
    """Call a driver function; returns its values without the code.

    Raises:
        CudaError: the code is not success.
        DeviceMemoryError: the GPU is out of memory.
    """
    code, *values = getattr(module, function)(*arguments)
    result = module.CUresult
    if code == result.CUDA_ERROR_OUT_OF_MEMORY:
        raise DeviceMemoryError(f"{function}: the GPU is out of memory", fix="close what else runs on it")
    if code != result.CUDA_SUCCESS:
        raise CudaError(f"{function} failed: {_reason(module, code)}")
    return values[0] if len(values) == 1 else values


def first_gpu_bus_id(module: Any = None) -> str:
    """The PCI bus id of the GPU that `CudaDevice` uses; takes none of its memory.

    Raises:
        BackendError: as `CudaDevice`.
    """
    driver = module or import_extra("cuda.bindings.driver", "tensorrt-rtx")
    _start(driver)
    device = checked(driver, "cuDeviceGet", 0)
    return bytes(checked(driver, "cuDeviceGetPCIBusId", 32, device)).split(b"\0")[0].decode()


class CudaDevice(Device):
    """The first visible GPU (choose with CUDA_VISIBLE_DEVICES), with a stream of its own.

    Args:
        needs_cuda: the oldest CUDA version, (major, minor), whose driver suffices.
        module: the bindings of the driver; `cuda.bindings.driver` by default.

    Raises:
        BackendError: cuda-python or the NVIDIA driver is missing, the driver is too old, or no GPU is visible.
    """

    name = "cuda"
    shares_host_memory = False

    def __init__(self, needs_cuda: tuple[int, int] = (12, 0), module: Any = None) -> None:
        self._driver = CudaDriver(module or import_extra("cuda.bindings.driver", "tensorrt-rtx"), needs_cuda)
        flags = self._driver.module.CUstream_flags.CU_STREAM_NON_BLOCKING
        self._stream = self._driver.call("cuStreamCreate", int(flags))
        self._driver.own(self, "cuStreamDestroy", self._stream)
        self._staging: deque[_Staging] = deque()  # the oldest copy first

    @property
    def stream_address(self) -> int:
        """The stream as a number, for libraries that take a handle."""
        return int(self._stream)

    def gpu_facts(self) -> GpuFacts:
        d, attribute = self._driver, self._driver.module.CUdevice_attribute
        major, minor = (
            d.call("cuDeviceGetAttribute", code, d.device)
            for code in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = bytes(d.call("cuDeviceGetName", 128, d.device)).split(b"\0")[0].decode(errors="replace")
        _, total = d.call("cuMemGetInfo")
        return GpuFacts(name, f"sm{major}{minor}", d.newest_cuda(), int(total))

    def allocate(self, size: int) -> Allocation:
        address = self._driver.call("cuMemAlloc", max(size, 1))
        self._driver.call("cuMemsetD8Async", address, 0, max(size, 1), self._stream)
        return _CudaAllocation(self._driver, address, size)

    def free_bytes(self) -> int:
        free, _ = self._driver.call("cuMemGetInfo")
        return int(free)

    def write(self, target: TensorRef, values: NDArray[Any]) -> None:
        whole = np.ascontiguousarray(np.broadcast_to(values, target.shape), storage_dtype(target.dtype))
        flat = whole.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, STAGING_BYTES):
            block = flat[start : start + STAGING_BYTES]
            staging = self._next_staging()
            staging.array[: block.size] = block
            self._driver.call("cuMemcpyHtoDAsync", target.address + start, staging.address, block.size, self._stream)
            self._driver.call("cuEventRecord", staging.copied.handle, self._stream)

    def read(self, source: TensorRef) -> NDArray[Any]:
        found = np.empty(size_bytes(source.dtype, source.shape), np.uint8)
        for start in range(0, found.size, STAGING_BYTES):
            block = found[start : start + STAGING_BYTES]
            staging = self._next_staging()
            self._driver.call("cuMemcpyDtoHAsync", staging.address, source.address + start, block.size, self._stream)
            self.wait()
            block[:] = staging.array[: block.size]
        return found.view(storage_dtype(source.dtype)).reshape(source.shape)

    def copy(self, target: TensorRef, source: TensorRef) -> None:
        size = size_bytes(source.dtype, source.shape)
        self._driver.call("cuMemcpyDtoDAsync", target.address, source.address, size, self._stream)

    def capture_graph(self, launches: Sequence[Launch]) -> Launch:
        """A CUDA graph of the launches. Before it is recorded they run once, in which libraries finish their set-up."""
        for launch in launches:
            launch()
        self.wait()
        try:
            return _RecordedGraph(self._driver, self._instantiated(launches), self._stream)
        except CudaError as error:
            raise not_recorded(error.problem, CudaError) from error

    def _instantiated(self, launches: Sequence[Launch]) -> Any:
        graph = self._capture(launches)
        try:
            return self._driver.call("cuGraphInstantiate", graph, 0)
        finally:
            self._driver.call("cuGraphDestroy", graph)

    def _capture(self, launches: Sequence[Launch]) -> Any:
        """Record the launches, in relaxed mode: the garbage collector may free other memory meanwhile."""
        mode = self._driver.module.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self._driver.call("cuStreamBeginCapture", self._stream, mode)
        try:
            for launch in launches:
                launch()
        except BaseException:
            with suppress(CudaError):  # the error of the launch says more than that of the capture
                self._driver.call("cuGraphDestroy", self._driver.call("cuStreamEndCapture", self._stream))
            raise
        return self._driver.call("cuStreamEndCapture", self._stream)

    def record_event(self) -> _Event:
        event = _Event(self._driver)
        self._driver.call("cuEventRecord", event.handle, self._stream)
        return event

    def elapsed_ms(self, start: _Event, end: _Event) -> float:
        return float(self._driver.call("cuEventElapsedTime", start.handle, end.handle))

    def wait(self) -> None:
        self._driver.call("cuStreamSynchronize", self._stream)

    def _next_staging(self) -> _Staging:
        """The buffer of the oldest copy, once that copy is done."""
        if len(self._staging) < STAGING_BUFFERS:
            staging = _Staging(self._driver)
        else:
            staging = self._staging.popleft()
            self._driver.call("cuEventSynchronize", staging.copied.handle)
        self._staging.append(staging)
        return staging


class _CudaAllocation(Allocation):
    def __init__(self, driver: CudaDriver, address: Any, size: int) -> None:
        self.address, self.size_bytes = int(address), size
        driver.own(self, "cuMemFree", address)


class _RecordedGraph:
    """An instantiated graph; a call launches it."""

    def __init__(self, driver: CudaDriver, executable: Any, stream: Any) -> None:
        self._driver, self._executable, self._stream = driver, executable, stream
        driver.own(self, "cuGraphExecDestroy", executable)
        driver.call("cuGraphUpload", executable, stream)

    def __call__(self) -> None:
        self._driver.call("cuGraphLaunch", self._executable, self._stream)


class _Event:
    def __init__(self, driver: CudaDriver) -> None:
        self.handle = driver.call("cuEventCreate", 0)
        driver.own(self, "cuEventDestroy", self.handle)


class _Staging:
    """A pinned host buffer, and the event behind its last copy."""

    def __init__(self, driver: CudaDriver) -> None:
        self.address = int(driver.call("cuMemHostAlloc", STAGING_BYTES, 0))
        self.array = host_array(TensorRef(self.address, "uint8", (STAGING_BYTES,)))
        self.copied = _Event(driver)
        driver.own(self, "cuMemFreeHost", self.address)


def _start(module: Any) -> None:
    """Initialise the driver."""
    result = module.CUresult
    try:
        (code,) = module.cuInit(0)
    except (RuntimeError, OSError) as error:  # the driver's library is not on this machine
        raise BackendError(NO_DRIVER) from error
    if code == result.CUDA_ERROR_NO_DEVICE:
        raise BackendError(
            "no NVIDIA GPU is visible", expected="at least one", fix="check CUDA_VISIBLE_DEVICES and the GPU"
        )
    if code != result.CUDA_SUCCESS:
        raise BackendError(f"the NVIDIA driver does not start: {_reason(module, code)}")


def _reason(module: Any, code: Any) -> str:
    found, text = module.cuGetErrorString(code)
    said = text.decode() if found == module.CUresult.CUDA_SUCCESS and isinstance(text, bytes) else "unknown"
    return f"{said} ({getattr(code, 'name', code)})"
