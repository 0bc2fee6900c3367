"""What the fake CUDA driver hands out: its codes, and the objects behind its handles."""

# ruff: noqa: N801  the driver's own names

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

Ranges = tuple[tuple[int, int], ...]  # (address, bytes)


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_ILLEGAL_STATE = 401
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_UNKNOWN = 999


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class CUstream_flags(IntEnum):
    CU_STREAM_DEFAULT = 0
    CU_STREAM_NON_BLOCKING = 1


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class DriverError(Exception):
    """Carries the code that a function returns."""

    def __init__(self, code: CUresult) -> None:
        super().__init__(code.name)
        self.code = code


@dataclass(eq=False)
class Work:
    """Something for the device to do; `device` and `host` are the memory it touches, checked when it is done."""

    run: Callable[[], None]
    device: Ranges = ()
    host: Ranges = ()
    done: bool = False


@dataclass
class Capture:
    thread: int
    mode: CUstreamCaptureMode
    works: list[Work] = field(default_factory=list)
    valid: bool = True


class Handle:
    """A driver object; a number to those who only pass it on."""

    _numbers = itertools.count(0x1000, 16)

    def __init__(self, number: int | None = None) -> None:
        self.number = next(Handle._numbers) if number is None else number

    def __int__(self) -> int:
        return self.number


class Stream(Handle):
    def __init__(self) -> None:
        super().__init__()
        self.pending: deque[Work] = deque()
        self.capture: Capture | None = None


class Event(Handle):
    def __init__(self) -> None:
        super().__init__()
        self.mark: Work | None = None
        self.stream: Stream | None = None
        self.seconds = 0.0


class Graph(Handle):
    def __init__(self, works: list[Work]) -> None:
        super().__init__()
        self.works = works
