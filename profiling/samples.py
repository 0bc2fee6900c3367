"""What a sampler records of a device, and the interface of the probes that read it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One reading of a device, `time_s` seconds after the start. A value is None if the device does not report it."""

    time_s: float
    process_bytes: int | None = None
    device_used_bytes: int | None = None  # by all processes
    device_total_bytes: int | None = None
    utilisation_percent: float | None = None
    memory_utilisation_percent: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class Peak:
    """The highest memory use of a run, and how it was measured."""

    size_bytes: int
    source: str


@dataclass(frozen=True)
class Recording:
    """Samples in order of time, the peak, and the budget if one was given."""

    samples: tuple[Sample, ...]
    peak: Peak
    budget_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        return self.peak.size_bytes

    @property
    def before_bytes(self) -> int:
        """Memory at the start, measured like the peak."""
        return memory_of(self.samples)[0]

    @property
    def headroom_bytes(self) -> int | None:
        """Budget minus peak; negative if the peak exceeds the budget."""
        return None if self.budget_bytes is None else self.budget_bytes - self.peak_bytes

    @property
    def over_budget(self) -> bool | None:
        return None if self.budget_bytes is None else self.peak_bytes > self.budget_bytes

    @property
    def device_before_bytes(self) -> int | None:
        """Memory used by all processes at the start."""
        return self.samples[0].device_used_bytes

    @property
    def device_peak_bytes(self) -> int | None:
        """Highest memory used by all processes."""
        return max((s.device_used_bytes for s in self.samples if s.device_used_bytes is not None), default=None)


def shows_process(samples: Sequence[Sample]) -> bool:
    """Whether the device reports the memory of this process. It may start to once the process uses the device."""
    return any(sample.process_bytes is not None for sample in samples)


def memory_of(samples: Sequence[Sample]) -> list[int]:
    """Bytes at each sample: of this process if the device reports them, else the growth of the device's use."""
    if shows_process(samples):
        return [sample.process_bytes or 0 for sample in samples]
    start = samples[0].device_used_bytes or 0
    return [(sample.device_used_bytes or start) - start for sample in samples]


class Probe(ABC):
    """Reads one device."""

    def start(self) -> None:  # noqa: B027 optional hook
        """Called once before the first sample."""

    @abstractmethod
    def sample(self, time_s: float) -> Sample:
        """Read the device now."""

    @abstractmethod
    def peak(self, samples: Sequence[Sample]) -> Peak:
        """The highest memory use since the start, given the samples taken."""

    def close(self) -> None:  # noqa: B027 optional hook
        """Called once after the last sample, also after a failure."""
