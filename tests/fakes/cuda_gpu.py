"""The GPU behind the fake driver: its memory, its streams, and what they have yet to do."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.fakes.cuda_handles import (
    CUresult,
    CUstreamCaptureMode,
    DriverError,
    Handle,
    Ranges,
    Stream,
    Work,
)

GARBAGE = 0xFF  # in fresh memory; NaN in every float type


NEEDS_NO_CONTEXT = {
    "cuInit", "cuDriverGetVersion", "cuGetErrorString", "cuDeviceGet", "cuDeviceGetAttribute", "cuDeviceGetName",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
}  # fmt: skip
# What the driver calls potentially unsafe: refused to a thread that captures, unless it captures relaxed.
UNSAFE = {"cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuStreamSynchronize", "cuEventSynchronize"}


class FakeGpu:
    """The one GPU, and what its driver keeps of it.

    `calls` are the functions called, in order; `live` the handles or addresses of what is not yet freed, by kind;
    `failing` functions return the code given for them.
    """

    def __init__(
        self,
        *,
        memory: int = 1 << 30,
        version: int = 13000,
        capability: tuple[int, int] = (8, 6),
        name: str = "NVIDIA GeForce RTX 3090",
        gpus: int = 1,
        installed: bool = True,
    ) -> None:
        self.memory, self.version, self.capability, self.name = memory, version, capability, name
        self.gpus, self.installed = gpus, installed
        self.calls: list[str] = []
        self.contexts: list[int] = []  # threads that made the context current
        self.failing: dict[str, CUresult] = {}
        self.live: dict[str, dict[int, Any]] = {
            kind: {} for kind in ("allocations", "pinned", "streams", "events", "graphs", "executables")
        }
        self._graveyard: list[Any] = []  # addresses are never given out twice, so that a late use is seen
        self._lock = threading.RLock()
        self._current = threading.local()
        self._started = False
        self._broken: CUresult | None = None

    # For tests and the fake TensorRT

    @property
    def count(self) -> Counter[str]:
        """Calls by name."""
        return Counter(self.calls)

    @property
    def allocated_bytes(self) -> int:
        return sum(size for size, _ in self.live["allocations"].values())

    def alive(self) -> dict[str, int]:
        """How many of each kind are not yet freed."""
        return {kind: len(found) for kind, found in self.live.items() if found}

    def recover(self) -> None:
        """After an error that the real driver does not recover from."""
        self._broken = None

    def has_context(self) -> bool:
        """Whether this thread may use the device."""
        return getattr(self._current, "context", None) is not None

    def enqueue(self, stream: int, run: Callable[[], None], device: Ranges = ()) -> None:
        """Launch a kernel. It touches these ranges of device memory."""
        with self._lock:
            self.calls.append("enqueue")
            self._submit(self.live["streams"][stream], Work(run, device))

    # State

    def _check_state(self, name: str) -> None:
        if name in self.failing:
            raise DriverError(self.failing[name])
        if not self._started and name not in ("cuInit", "cuDriverGetVersion", "cuGetErrorString"):
            raise DriverError(CUresult.CUDA_ERROR_NOT_INITIALIZED)
        if name in NEEDS_NO_CONTEXT:
            return
        if not self.has_context():
            raise DriverError(CUresult.CUDA_ERROR_INVALID_CONTEXT)
        if self._broken is not None:
            raise DriverError(self._broken)
        if name in UNSAFE:
            self._refuse_while_capturing()

    def _refuse_while_capturing(self) -> None:
        for stream in self.live["streams"].values():
            capture = stream.capture
            if capture is None or capture.thread != threading.get_ident():
                continue
            if capture.mode != CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED:
                capture.valid = False
                raise DriverError(CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)

    def _submit(self, stream: Stream, work: Work) -> None:
        (stream.pending if stream.capture is None else stream.capture.works).append(work)

    def _execute(self, work: Work) -> None:
        inside = (
            *(self._inside("allocations", *touched) for touched in work.device),
            *(self._inside("pinned", *touched) for touched in work.host),
        )
        if not all(inside):
            self._broken = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
            raise DriverError(self._broken)
        work.run()
        work.done = True

    def _drain(self, stream: Stream, last: Work | None = None) -> None:
        while stream.pending and not (last is not None and last.done):
            self._execute(stream.pending.popleft())

    def _drain_all(self) -> None:
        for stream in self.live["streams"].values():
            self._drain(stream)

    def _inside(self, kind: str, address: int, size: int) -> bool:
        """Whether the bytes lie in one block."""
        return any(start <= address and address + size <= start + held for start, (held, _) in self.live[kind].items())

    def _require(self, kind: str, address: int, size: int) -> None:
        if not self._inside(kind, address, size):
            raise DriverError(CUresult.CUDA_ERROR_INVALID_VALUE)

    def _new(self, kind: str, handle: Handle) -> Handle:
        self.live[kind][int(handle)] = handle
        return handle

    def _find(self, kind: str, handle: Any) -> Any:
        try:
            return self.live[kind][int(handle)]
        except KeyError:
            raise DriverError(CUresult.CUDA_ERROR_INVALID_HANDLE) from None

    def _destroy(self, kind: str, handle: Any) -> None:
        found = self._find(kind, handle)
        self._graveyard.append(found)
        del self.live[kind][int(handle)]

    def _hold(self, kind: str, size: int) -> int:
        """Memory at an address that is a multiple of 256, and of nothing larger."""
        raw = np.empty(size + 768, np.uint8)
        address = -(-raw.ctypes.data // 512) * 512 + 256
        self.live[kind][address] = (size, raw)
        return address


def memory(address: int, size: int) -> np.ndarray:
    """The bytes at an address."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def fill(address: int, size: int, value: int) -> None:
    ctypes.memset(address, value, size)


def move(target: int, source: int, size: int) -> None:
    ctypes.memmove(target, source, size)
