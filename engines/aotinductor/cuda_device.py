"""An NVIDIA GPU through torch, for engines whose library is torch.

There is one stream. Recorded launches share one pool of memory, for they are replayed one after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.dtypes import size_bytes, storage_dtype
from ...core.tensors import Launch, TensorRef
from ...errors import BackendError, DeviceMemoryError, FastvarError, InternalError, RehearsalWarning
from ..device import Allocation, Device, GpuFacts, not_recorded
from . import stand_in_gpu


class TorchCudaDevice(Device):
    """torch's current GPU (choose with CUDA_VISIBLE_DEVICES).

    Raises:
        BackendError: torch finds no GPU.
    """

    name = "cuda"
    shares_host_memory = False

    def __init__(self, torch: Any) -> None:
        if not torch.cuda.is_available():
            raise BackendError(
                "torch finds no GPU, and these engines run on an NVIDIA GPU",
                expected="an NVIDIA driver and a CUDA build of torch",
                fix="run there, or build for the CPU: leave --target away",
            )
        if stand_in_gpu.is_stood_in():  # for cuDNN there is no stand-in
            torch.backends.cudnn.enabled = False
            warnings.warn(stand_in_gpu.NONSENSE, RehearsalWarning, stacklevel=2)
        self._torch = torch
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def gpu_facts(self) -> GpuFacts:
        """As torch tells them, which keeps the driver's version to itself."""
        found = self._torch.cuda.get_device_properties(self._torch.cuda.current_device())
        return GpuFacts(found.name, f"sm{found.major}{found.minor}", None, int(found.total_memory))

    def stream(self) -> AbstractContextManager[Any]:
        """A context whose launches go to this device's stream."""
        found: AbstractContextManager[Any] = self._torch.cuda.stream(self._stream)
        return found

    def tensor(self, ref: TensorRef) -> Any:
        """A torch tensor on existing memory, which the caller keeps alive."""
        flat = self._torch.as_tensor(_DeviceBytes(ref), device=self.name)
        return flat.view(getattr(self._torch, ref.dtype)).view(ref.shape)

    def allocate(self, size: int) -> Allocation:
        try:
            with self.stream():
                return _TorchAllocation(self._torch.zeros(size, dtype=self._torch.uint8, device=self.name))
        except self._torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{size} bytes are more than the GPU has free", fix="close what else runs on it"
            ) from error

    def free_bytes(self) -> int | None:
        free, _ = self._torch.cuda.mem_get_info()
        return int(free)

    def write(self, target: TensorRef, values: NDArray[Any]) -> None:
        held = np.empty(target.shape, storage_dtype(target.dtype))
        held[...] = values
        # The memory is pageable: the call returns once the driver has its own copy.
        with self.stream():
            self.tensor(target).view(-1).view(self._torch.uint8).copy_(_host_bytes(self._torch, held))

    def read(self, source: TensorRef) -> NDArray[Any]:
        held = np.empty(source.shape, storage_dtype(source.dtype))
        with self.stream():
            _host_bytes(self._torch, held).copy_(self.tensor(source).view(-1).view(self._torch.uint8))
        self.wait()
        return held

    def copy(self, target: TensorRef, source: TensorRef) -> None:
        with self.stream():
            self.tensor(target).copy_(self.tensor(source))

    def capture_graph(self, launches: Sequence[Launch]) -> Launch:
        for launch in launches:  # at the first call libraries make handles and load kernels, not while recording
            launch()
        self.wait()
        graph = self._torch.cuda.CUDAGraph()
        recording = self._torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        try:
            with recording:
                for launch in launches:
                    launch()
        except RuntimeError as error:
            self._pool = self._torch.cuda.graph_pool_handle()  # torch 2.11 never ends recording into that of a lost one
            cause = _first_of(error)
            if isinstance(cause, FastvarError | InternalError):
                raise cause from None
            raise not_recorded(cause) from error

        def replay() -> None:
            with self.stream():
                graph.replay()

        return replay

    def record_event(self) -> Any:
        event = self._torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def wait(self) -> None:
        self._stream.synchronize()


class _TorchAllocation(Allocation):
    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.address = memory.data_ptr()
        self.size_bytes = memory.numel()


class _DeviceBytes:
    """Memory of the GPU in the form that torch adopts without a copy."""

    def __init__(self, ref: TensorRef) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes(ref.dtype, ref.shape),),
            "typestr": "|u1",
            "data": (ref.address, False),
            "version": 3,
        }


def _first_of(error: BaseException) -> BaseException:
    """What went wrong first: a capture that is lost with a launch fails once more where it ends."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _host_bytes(torch: Any, array: NDArray[Any]) -> Any:
    return torch.from_numpy(array.reshape(-1).view(np.uint8))
