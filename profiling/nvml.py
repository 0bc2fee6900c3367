"""Peak GPU memory by NVML (nvidia-ml-py), sampled by a thread: what the whole device holds, not only our own."""

from __future__ import annotations

from threading import Event, Thread
from typing import Any

from ..errors import BackendError
from ..packages import import_extra

INTERVAL_S = 0.01


class MemorySampler:
    """Samples device memory while its block runs. `peak_bytes` and `before_bytes` are of the whole device.

    Raises:
        BackendError: nvidia-ml-py or the NVIDIA driver is missing.
    """

    def __init__(self, device: int = 0, nvml: Any = None) -> None:
        self._nvml = nvml or import_extra("pynvml", "nvml")
        try:
            self._nvml.nvmlInit()
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(device)
        except self._nvml.NVMLError as error:
            raise BackendError(f"NVML does not answer: {error}", fix="install the NVIDIA driver") from error
        self._done = Event()
        self._thread = Thread(target=self._sample, daemon=True)
        self.before_bytes = self.peak_bytes = self._used()

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, self._used())

    def _sample(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self.peak_bytes = max(self.peak_bytes, self._used())

    def _used(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
