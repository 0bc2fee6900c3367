"""Reads an NVIDIA GPU, identified by its PCI bus id, through NVML (nvidia-ml-py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ..core.platform import import_extra
from ..errors import BackendError
from .samples import Peak, Probe, Sample, memory_of, shows_process

OWN = "memory of this process as NVML lists it, the highest of all samples"
CHANGE = (
    "change of the whole GPU's memory since the start, the highest of all samples: NVML does not show this process "
    "(it does not in most containers)"
)


class NvmlProbe(Probe):
    """Reads one GPU; without a bus id the first that NVML lists.

    A reading that the GPU does not support is None, and is not asked for again. In containers NVML lists no processes,
    processes of another pid namespace, or no memory: then process bytes are None, and the growth of the device counts.

    Raises:
        BackendError: nvidia-ml-py or the NVIDIA driver is missing, or (while sampling) the GPU no longer answers.
    """

    def __init__(self, bus_id: str = "", *, nvml: Any = None) -> None:
        self._nvml = nvml or import_extra("pynvml", "nvml")
        self._unsupported: set[str] = set()
        try:
            self._nvml.nvmlInit()
            self._gpu = (
                self._nvml.nvmlDeviceGetHandleByPciBusId(bus_id) if bus_id else self._nvml.nvmlDeviceGetHandleByIndex(0)
            )
        except self._nvml.NVMLError as error:
            raise BackendError(
                f"NVML does not answer: {error}",
                expected="an NVIDIA GPU with its driver",
                fix="install the NVIDIA driver; in a container give it the GPU with its utility capability",
            ) from error

    def sample(self, time_s: float) -> Sample:
        memory, rates, n = self._ask("nvmlDeviceGetMemoryInfo"), self._ask("nvmlDeviceGetUtilizationRates"), self._nvml
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return Sample(
            time_s,
            process_bytes=self._process_bytes(),
            device_used_bytes=None if memory is None else int(memory.used),
            device_total_bytes=None if memory is None else int(memory.total),
            utilisation_percent=None if rates is None else float(rates.gpu),
            memory_utilisation_percent=None if rates is None else float(rates.memory),
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", n.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", n.NVML_CLOCK_MEM),
            power_w=None if milliwatts is None else milliwatts / 1e3,
            temperature_c=self._ask("nvmlDeviceGetTemperature", n.NVML_TEMPERATURE_GPU),
        )

    def peak(self, samples: Sequence[Sample]) -> Peak:
        return Peak(max(memory_of(samples)), OWN if shows_process(samples) else CHANGE)

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _process_bytes(self) -> int | None:
        """A process that computes and draws is in both lists, with all its memory in each."""
        names = ("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetGraphicsRunningProcesses")
        listed = [process for name in names for process in self._ask(name) or ()]
        own = [process.usedGpuMemory for process in listed if process.pid == os.getpid()]
        return max((int(used) for used in own if used is not None), default=None)

    def _ask(self, function: str, *arguments: int) -> Any:
        """The answer of NVML; None if it is unsupported, and from then on."""
        question = f"{function}{arguments}"
        if question in self._unsupported:
            return None
        n = self._nvml
        ask: Callable[..., Any] = getattr(n, function)
        try:
            return ask(self._gpu, *arguments)
        except (n.NVMLError_NotSupported, n.NVMLError_NoPermission, n.NVMLError_FunctionNotFound):
            self._unsupported.add(question)
            return None
        except n.NVMLError as error:
            raise BackendError(f"the GPU no longer answers to {function}: {error}") from error
