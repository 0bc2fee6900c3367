"""A CUDA driver of host memory, in place of `cuda.bindings.driver`: what runs on a GPU is tested on a CPU.

As asynchronous as it can be: whatever goes to a stream is done when somebody waits for it, and no sooner. Memory that
is read too early or freed too early, a missing wait, and a wait during a capture are errors here, not luck.
"""

# ruff: noqa: N802  the driver's own names

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from tests.fakes.cuda_gpu import GARBAGE, FakeGpu, fill, memory, move
from tests.fakes.cuda_handles import (
    Capture,
    CUdevice_attribute,
    CUresult,
    CUstream_flags,
    CUstreamCaptureMode,
    DriverError,
    Event,
    Graph,
    Handle,
    Ranges,
    Stream,
    Work,
)


def driver_function(method: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
    """The driver's convention: never raises, returns (code, values...), with None for values that there are not."""
    name = method.__name__
    nothing = {"None": (), "tuple[int, int]": (None, None)}.get(method.__annotations__["return"], (None,))

    @wraps(method)
    def call(self: FakeDriver, *arguments: Any) -> tuple[Any, ...]:
        with self._lock:
            self.calls.append(name)
            try:
                self._check_state(name)
                values = method(self, *arguments)
            except DriverError as error:
                return (error.code, *nothing)
        if values is None:
            return (CUresult.CUDA_SUCCESS,)
        return (CUresult.CUDA_SUCCESS, *(values if isinstance(values, tuple) else (values,)))

    return call


class FakeDriver(FakeGpu):
    """The module: the driver's functions, and its names."""

    CUresult = CUresult
    CUdevice_attribute = CUdevice_attribute
    CUstream_flags = CUstream_flags
    CUstreamCaptureMode = CUstreamCaptureMode

    # Start, device, context

    @driver_function
    def cuInit(self, flags: int) -> None:
        if not self.installed:
            raise RuntimeError("libcuda.so.1: cannot open shared object file")
        if not self.gpus:
            raise DriverError(CUresult.CUDA_ERROR_NO_DEVICE)
        self._started = True

    @driver_function
    def cuDriverGetVersion(self) -> int:
        return self.version

    @driver_function
    def cuGetErrorString(self, code: CUresult) -> bytes:
        return code.name.removeprefix("CUDA_").replace("_", " ").lower().encode()

    @driver_function
    def cuDeviceGet(self, ordinal: int) -> Handle:
        if ordinal >= self.gpus:
            raise DriverError(CUresult.CUDA_ERROR_INVALID_VALUE)
        return Handle(ordinal)

    @driver_function
    def cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: Handle) -> int:
        return self.capability[attribute - CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR]

    @driver_function
    def cuDeviceGetName(self, length: int, device: Handle) -> bytes:
        return self.name.encode().ljust(length, b"\0")

    @driver_function
    def cuDeviceGetPCIBusId(self, length: int, device: Handle) -> bytes:
        return b"0000:65:00.0" + b"\0" * (length - 12)

    @driver_function
    def cuDevicePrimaryCtxRetain(self, device: Handle) -> Handle:
        return Handle()

    @driver_function
    def cuCtxSetCurrent(self, context: Handle) -> None:
        self.contexts.append(threading.get_ident())
        self._current.context = context

    # Memory

    @driver_function
    def cuMemGetInfo(self) -> tuple[int, int]:
        return self.memory - self.allocated_bytes, self.memory

    @driver_function
    def cuMemAlloc(self, size: int) -> Handle:
        if size <= 0:
            raise DriverError(CUresult.CUDA_ERROR_INVALID_VALUE)
        if self.allocated_bytes + size > self.memory:
            raise DriverError(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        address = self._hold("allocations", size)
        memory(address, size)[:] = GARBAGE
        return Handle(address)

    @driver_function
    def cuMemFree(self, address: Any) -> None:
        self._drain_all()  # the real one waits as well
        self._destroy("allocations", address)

    @driver_function
    def cuMemHostAlloc(self, size: int, flags: int) -> int:
        return self._hold("pinned", size)

    @driver_function
    def cuMemFreeHost(self, address: int) -> None:
        self._drain_all()
        self._destroy("pinned", address)

    @driver_function
    def cuMemsetD8Async(self, address: Any, value: int, size: int, stream: Stream) -> None:
        start = int(address)
        self._require("allocations", start, size)
        self._submit(self._find("streams", stream), Work(lambda: fill(start, size, value), ((start, size),)))

    @driver_function
    def cuMemcpyHtoDAsync(self, target: Any, source: int, size: int, stream: Stream) -> None:
        self._copy(int(target), source, ((int(target), size),), ((source, size),), size, stream)

    @driver_function
    def cuMemcpyDtoHAsync(self, target: int, source: Any, size: int, stream: Stream) -> None:
        self._copy(target, int(source), ((int(source), size),), ((target, size),), size, stream)

    @driver_function
    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: Stream) -> None:
        touched = ((target, size), (source, size))
        for block in touched:
            self._require("allocations", *block)
        self._submit(self._find("streams", stream), Work(lambda: move(target, source, size), touched))

    def _copy(self, target: int, source: int, device: Ranges, host: Ranges, size: int, stream: Stream) -> None:
        self._require("allocations", *device[0])
        self._require("pinned", *host[0])  # a copy from elsewhere would not be asynchronous
        self._submit(self._find("streams", stream), Work(lambda: move(target, source, size), device, host))

    # Streams and events

    @driver_function
    def cuStreamCreate(self, flags: int) -> Handle:
        return self._new("streams", Stream())

    @driver_function
    def cuStreamDestroy(self, stream: Stream) -> None:
        self._drain(self._find("streams", stream))
        self._destroy("streams", stream)

    @driver_function
    def cuStreamSynchronize(self, stream: Stream) -> None:
        capture = self._find("streams", stream).capture
        if capture is not None:  # in a relaxed capture as well
            capture.valid = False
            raise DriverError(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        self._drain(stream)

    @driver_function
    def cuEventCreate(self, flags: int) -> Handle:
        return self._new("events", Event())

    @driver_function
    def cuEventDestroy(self, event: Event) -> None:
        self._destroy("events", event)

    @driver_function
    def cuEventRecord(self, event: Event, stream: Stream) -> None:
        def stamp() -> None:
            event.seconds = time.perf_counter()

        self._find("events", event)
        event.stream, event.mark = self._find("streams", stream), Work(stamp)
        self._submit(event.stream, event.mark)

    @driver_function
    def cuEventSynchronize(self, event: Event) -> None:
        self._find("events", event)
        if event.mark is not None and event.stream is not None:
            self._drain(event.stream, event.mark)

    @driver_function
    def cuEventElapsedTime(self, start: Event, end: Event) -> float:
        for event in (start, end):
            self._find("events", event)
            if event.mark is None:
                raise DriverError(CUresult.CUDA_ERROR_INVALID_HANDLE)
            if not event.mark.done:
                raise DriverError(CUresult.CUDA_ERROR_NOT_READY)
        return (end.seconds - start.seconds) * 1e3

    # Graphs

    @driver_function
    def cuStreamBeginCapture(self, stream: Stream, mode: CUstreamCaptureMode) -> None:
        if self._find("streams", stream).capture is not None:
            raise DriverError(CUresult.CUDA_ERROR_ILLEGAL_STATE)
        stream.capture = Capture(threading.get_ident(), mode)

    @driver_function
    def cuStreamEndCapture(self, stream: Stream) -> Handle:
        capture, stream.capture = self._find("streams", stream).capture, None
        if capture is None:
            raise DriverError(CUresult.CUDA_ERROR_ILLEGAL_STATE)
        if not capture.valid:
            raise DriverError(CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
        return self._new("graphs", Graph(capture.works))

    @driver_function
    def cuGraphInstantiate(self, graph: Graph, flags: int) -> Handle:
        return self._new("executables", Graph(list(self._find("graphs", graph).works)))

    @driver_function
    def cuGraphUpload(self, executable: Graph, stream: Stream) -> None:
        self._find("executables", executable)

    @driver_function
    def cuGraphLaunch(self, executable: Graph, stream: Stream) -> None:
        works = self._find("executables", executable).works

        def run() -> None:
            for work in works:
                self._execute(work)

        self._submit(self._find("streams", stream), Work(run))

    @driver_function
    def cuGraphDestroy(self, graph: Graph) -> None:
        self._destroy("graphs", graph)

    @driver_function
    def cuGraphExecDestroy(self, executable: Graph) -> None:
        self._destroy("executables", executable)
