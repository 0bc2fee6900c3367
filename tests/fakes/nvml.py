"""NVML in place of `pynvml`: a GPU that tells what a test gives it, and counts what it is asked."""

# ruff: noqa: N802  the library's own names

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

BUS_ID = "0000:65:00.0"


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
    pass


class NVMLError_NoPermission(NVMLError):  # noqa: N801, N818
    pass


class NVMLError_FunctionNotFound(NVMLError):  # noqa: N801, N818
    pass


class FakeNvml:
    """`used` is the memory of the whole GPU, the last value for ever; `processes` lists (pid, bytes)."""

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    NVMLError_NoPermission = NVMLError_NoPermission
    NVMLError_FunctionNotFound = NVMLError_FunctionNotFound
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, used: tuple[int, ...] = (1000,)) -> None:
        self.used = list(used)
        self.compute: Callable[[], list[tuple[int, int | None]]] = lambda: [(os.getpid(), 300)]
        self.graphics: Callable[[], list[tuple[int, int | None]]] = list
        self.fails: dict[str, Exception] = {}
        self.asked: Counter[str] = Counter()
        self.open = 0

    def _answer(self, name: str, value: Any) -> Any:
        self.asked[name] += 1
        if name in self.fails:
            raise self.fails[name]
        return value

    def nvmlInit(self) -> None:
        self._answer("nvmlInit", None)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:
        return self._answer("nvmlDeviceGetHandleByPciBusId", bus_id)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return self._answer("nvmlDeviceGetHandleByIndex", BUS_ID)

    def nvmlDeviceGetMemoryInfo(self, gpu: str) -> SimpleNamespace:
        assert gpu == BUS_ID
        used = self.used.pop(0) if len(self.used) > 1 else self.used[0]
        return self._answer("nvmlDeviceGetMemoryInfo", SimpleNamespace(used=used, total=8000, free=8000 - used))

    def nvmlDeviceGetUtilizationRates(self, _: str) -> SimpleNamespace:
        return self._answer("nvmlDeviceGetUtilizationRates", SimpleNamespace(gpu=91, memory=47))

    def nvmlDeviceGetClockInfo(self, _: str, clock: int) -> int:
        return self._answer(f"nvmlDeviceGetClockInfo {clock}", {1: 1695, 2: 9751}[clock])

    def nvmlDeviceGetPowerUsage(self, _: str) -> int:
        return self._answer("nvmlDeviceGetPowerUsage", 217_500)

    def nvmlDeviceGetTemperature(self, _: str, sensor: int) -> int:
        return self._answer("nvmlDeviceGetTemperature", {0: 61}[sensor])

    def nvmlDeviceGetComputeRunningProcesses(self, _: str) -> list[SimpleNamespace]:
        return self._processes("nvmlDeviceGetComputeRunningProcesses", self.compute())

    def nvmlDeviceGetGraphicsRunningProcesses(self, _: str) -> list[SimpleNamespace]:
        return self._processes("nvmlDeviceGetGraphicsRunningProcesses", self.graphics())

    def _processes(self, name: str, listed: list[tuple[int, int | None]]) -> list[SimpleNamespace]:
        return self._answer(name, [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in listed])
