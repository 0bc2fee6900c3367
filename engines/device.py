"""Where engines run: who owns the memory, and the order of what is launched. Invariants:

* whatever is given to a device (`write`, launches, `record_event`) happens in the order it was given;
* only `read` and `wait` wait for it, everything else returns at once where the device allows;
* memory is allocated once, zeroed, and lives as long as the device's owner holds the allocation.
"""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.dtypes import human_bytes, size_bytes, storage_dtype
from ..core.platform import memory_bytes
from ..core.tensors import Launch, TensorRef
from ..errors import BackendError, DeviceMemoryError, InternalError

ALIGNMENT = 256  # bytes; what CUDA allocations give, and more than any CPU kernel asks for


@dataclass(frozen=True)
class GpuFacts:
    """Facts of a GPU: `capability` as "sm86"; `driver_cuda`, the newest CUDA version that its driver runs, if told."""

    name: str
    capability: str
    driver_cuda: tuple[int, int] | None
    memory_bytes: int


class Allocation(ABC):
    """A block of zeroed memory, freed with this object."""

    address: int
    size_bytes: int


class Device(ABC):
    """Memory, order and time of one device."""

    name: str
    shares_host_memory: bool  # engines read the host's memory: weights are used where the file is mapped

    @abstractmethod
    def allocate(self, size: int) -> Allocation:
        """Zeroed memory, 256-byte aligned.

        Raises:
            DeviceMemoryError: more than is free.
        """

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Memory that can still be allocated; None where nobody can say."""

    def gpu_facts(self) -> GpuFacts | None:
        """Name, generation, driver and memory of a GPU; None of a CPU."""
        return None

    @abstractmethod
    def write(self, target: TensorRef, values: NDArray[Any]) -> None:
        """Copy host values of the target's shape into its memory; `values` may be changed right afterwards."""

    @abstractmethod
    def read(self, source: TensorRef) -> NDArray[Any]:
        """Wait, then the tensor on the host: bfloat16 as uint16. A copy, or a live view where memory is shared."""

    @abstractmethod
    def copy(self, target: TensorRef, source: TensorRef) -> None:
        """Copy a tensor inside the device's memory, in order with the launches."""

    @abstractmethod
    def capture_graph(self, launches: Sequence[Launch]) -> Launch:
        """One launch that repeats these in order; they must be prepared, and their memory theirs for good.

        Raises:
            BackendError: the device cannot record them; `run_sequentially` makes them one by one.
        """

    @abstractmethod
    def record_event(self) -> Any:
        """A point in the order of launches, for `elapsed_ms`."""

    @abstractmethod
    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks, both passed: call `wait` first."""

    @abstractmethod
    def wait(self) -> None:
        """Until everything given so far is done."""


class HostDevice(Device):
    """The CPU: launches run where they are called, and memory is numpy's."""

    name = "cpu"
    shares_host_memory = True

    def allocate(self, size: int) -> Allocation:
        return _HostAllocation(size)

    def free_bytes(self) -> int | None:
        """All memory of the machine, or of the container around this process: the host swaps, and drops what it can
        read again, so what is free this moment says little.
        """
        return memory_bytes()

    def write(self, target: TensorRef, values: NDArray[Any]) -> None:
        host_array(target)[...] = values

    def read(self, source: TensorRef) -> NDArray[Any]:
        return host_array(source)

    def copy(self, target: TensorRef, source: TensorRef) -> None:
        host_array(target)[...] = host_array(source)

    def capture_graph(self, launches: Sequence[Launch]) -> Launch:
        return run_sequentially(launches)

    def record_event(self) -> float:
        return time.perf_counter()

    def elapsed_ms(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def wait(self) -> None:
        pass


def not_recorded(cause: object, kind: type[BackendError] = BackendError) -> BackendError:
    """What a device says of launches that it cannot record."""
    return kind(
        f"launches cannot be recorded as a CUDA graph: {cause}",
        fix="load with cuda_graphs=False (--no-cuda-graphs): they are then made one by one",
    )


def run_sequentially(launches: Sequence[Launch]) -> Launch:
    """One launch that makes these, one by one."""

    def run() -> None:
        for launch in launches:
            launch()

    return run


class _HostAllocation(Allocation):
    def __init__(self, size: int) -> None:
        try:
            self._raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)
        except MemoryError as error:
            raise DeviceMemoryError(
                f"{human_bytes(size)} of memory cannot be allocated",
                expected="room for caches and activations",
                fix="choose a smaller size, or close what else runs on this machine",
            ) from error
        self.address = -(-self._raw.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.size_bytes = size


def host_array(ref: TensorRef) -> NDArray[Any]:
    """Host memory as an array, without a copy; the caller keeps the memory alive."""
    size = size_bytes(ref.dtype, ref.shape)
    if size == 0:
        raise InternalError(f"a tensor of shape {list(ref.shape)} has no memory")
    raw = (ctypes.c_uint8 * size).from_address(ref.address)
    return np.ctypeslib.as_array(raw).view(storage_dtype(ref.dtype)).reshape(ref.shape)
