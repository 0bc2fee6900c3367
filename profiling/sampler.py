"""What a run takes of a device, sampled by a thread: memory, and use, clocks, power, temperature where it tells.

Knows no model and no library: a probe asks the device (host_probe.py, nvml_probe.py).
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event, Lock

_log = logging.getLogger(__name__)

INTERVAL_S = 0.01


@dataclass(frozen=True)
class Sample:
    """One look at a device, `time_s` seconds after the start. None where the device does not say."""

    time_s: float
    process_bytes: int | None = None
    device_used_bytes: int | None = None  # by everybody
    device_total_bytes: int | None = None
    utilisation_percent: float | None = None
    memory_utilisation_percent: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: float | None = None


@dataclass(frozen=True)
class Peak:
    """The most memory that a run took, and who says so."""

    size_bytes: int
    source: str


@dataclass(frozen=True)
class Recording:
    """Samples in the order of time, and the peak, against a budget where there is one."""

    samples: tuple[Sample, ...]
    peak: Peak
    budget_bytes: int | None = None

    @property
    def peak_bytes(self) -> int:
        return self.peak.size_bytes

    @property
    def before_bytes(self) -> int:
        """Memory at the start, counted as the peak is."""
        return memory_of(self.samples)[0]

    @property
    def headroom_bytes(self) -> int | None:
        """What the budget leaves; negative where the peak is over it."""
        return None if self.budget_bytes is None else self.budget_bytes - self.peak_bytes

    @property
    def over_budget(self) -> bool | None:
        return None if self.budget_bytes is None else self.peak_bytes > self.budget_bytes

    @property
    def device_before_bytes(self) -> int | None:
        """What everybody together used at the start."""
        return self.samples[0].device_used_bytes

    @property
    def device_peak_bytes(self) -> int | None:
        """The most that everybody together used."""
        return max((s.device_used_bytes for s in self.samples if s.device_used_bytes is not None), default=None)


def shows_process(samples: Sequence[Sample]) -> bool:
    """Whether the device tells what this process holds. It may begin to when the process first uses it."""
    return any(sample.process_bytes is not None for sample in samples)


def memory_of(samples: Sequence[Sample]) -> list[int]:
    """Bytes at every sample: the process's own, else how much more the device holds than at the start."""
    if shows_process(samples):
        return [sample.process_bytes or 0 for sample in samples]
    start = samples[0].device_used_bytes or 0
    return [(sample.device_used_bytes or start) - start for sample in samples]


class Probe(ABC):
    """Asks one device."""

    def start(self) -> None:  # noqa: B027 most have nothing to prepare
        """Called once before the first sample."""

    @abstractmethod
    def sample(self, time_s: float) -> Sample:
        """The device as it is now."""

    @abstractmethod
    def peak(self, samples: Sequence[Sample]) -> Peak:
        """The most memory since the start, when these samples were taken."""

    def close(self) -> None:  # noqa: B027 most hold nothing
        """Called once after the last sample, also when something failed."""


class Sampler:
    """Samples while its block runs; `recording` is there behind it.

    Args:
        interval_s: seconds between two samples of the thread.
        budget_bytes: what the peak is held against.

    Raises:
        Exception: at the end of the block, whatever stopped the thread; unless the block failed itself.
    """

    recording: Recording

    def __init__(self, probe: Probe, *, interval_s: float = INTERVAL_S, budget_bytes: int | None = None) -> None:
        self._probe, self._interval_s, self._budget_bytes = probe, interval_s, budget_bytes
        self._samples: list[Sample] = []
        self._lock, self._done = Lock(), Event()
        self._begun = time.perf_counter()
        self._closing = ExitStack()
        self._watch: Future[None]

    def __enter__(self) -> Sampler:
        with ExitStack() as stack:
            stack.callback(self._probe.close)
            self._probe.start()
            self._begun = time.perf_counter()
            self.sample()
            # An executor, because its future keeps what stopped the thread.
            thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="fastvar-sampler"))
            stack.callback(self._done.set)
            self._watch = thread.submit(self._run)
            self._closing = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._closing:
            self._done.set()
            failure = self._watch.exception()
            if kind is not None:
                if failure is not None:
                    _log.warning("sampling stopped early: %s", failure)
                return
            if failure is not None:
                raise failure
            self.sample()
            samples = tuple(self._samples)
            self.recording = Recording(samples, self._probe.peak(samples), self._budget_bytes)

    def sample(self) -> Sample:
        """Look now, besides the thread: in step with what is measured."""
        with self._lock:
            sample = self._probe.sample(self.elapsed_s())
            self._samples.append(sample)
        return sample

    def elapsed_s(self) -> float:
        """Seconds since the start, on the samples' clock."""
        return time.perf_counter() - self._begun

    def _run(self) -> None:
        while not self._done.wait(self._interval_s):
            self.sample()


def sampler_for(kind: str, *, interval_s: float = INTERVAL_S, budget_bytes: int | None = None) -> Sampler:
    """The sampler of a kind of device: "cpu", or "cuda" for the first visible GPU.

    Raises:
        BackendError: nvidia-ml-py or the NVIDIA driver is missing.
    """
    return Sampler(probe_for(kind), interval_s=interval_s, budget_bytes=budget_bytes)


def probe_for(kind: str) -> Probe:
    """What asks a kind of device; see `sampler_for`."""
    if kind == "cpu":
        from .host_probe import HostProbe

        return HostProbe()
    from ..engines.cuda import first_gpu_bus_id
    from .nvml_probe import NvmlProbe

    return NvmlProbe(first_gpu_bus_id())
