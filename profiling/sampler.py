"""Samples a device in a thread: memory, and utilisation, clocks, power and temperature if the device reports them."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event, Lock

from .samples import Probe, Recording, Sample

_log = logging.getLogger(__name__)

INTERVAL_S = 0.01


class Sampler:
    """Samples while its block runs; `recording` exists after the block.

    Args:
        interval_s: seconds between two samples of the thread.
        budget_bytes: the budget that the peak is compared with.

    Raises:
        Exception: at the end of the block, the exception that stopped the thread, unless the block raised one.
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
            # The future of an executor keeps the exception that stopped the thread.
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
        """Take a sample now, in addition to those of the thread."""
        with self._lock:
            sample = self._probe.sample(self.elapsed_s())
            self._samples.append(sample)
        return sample

    def elapsed_s(self) -> float:
        """Seconds since the start, on the clock of the samples."""
        return time.perf_counter() - self._begun

    def _run(self) -> None:
        while not self._done.wait(self._interval_s):
            self.sample()


def sampler_for(kind: str, *, interval_s: float = INTERVAL_S) -> Sampler:
    """A sampler of a kind of device; see `probe_for`."""
    return Sampler(probe_for(kind), interval_s=interval_s)


def probe_for(kind: str) -> Probe:
    """The probe of a kind of device: "cpu", or "cuda" for the first visible GPU.

    Raises:
        BackendError: nvidia-ml-py or the NVIDIA driver is missing.
    """
    if kind == "cpu":
        from .host_probe import HostProbe

        return HostProbe()
    from ..engines.tensorrt.cuda_device import first_gpu_bus_id
    from .nvml_probe import NvmlProbe

    return NvmlProbe(first_gpu_bus_id())
