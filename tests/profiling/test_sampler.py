"""The sampler on a fake NVML, on a fake /proc, and on this very process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fastvar.engines.tensorrt.cuda_device import first_gpu_bus_id
from fastvar.errors import BackendError
from fastvar.profiling import host_probe, nvml_probe
from fastvar.profiling.host_probe import HostProbe
from fastvar.profiling.nvml_probe import NvmlProbe
from fastvar.profiling.sampler import Sampler, sampler_for
from fastvar.profiling.samples import Peak, Probe, Recording, Sample, memory_of
from tests.fakes import nvml as fake_nvml
from tests.fakes.cuda import FakeDriver
from tests.fakes.nvml import BUS_ID, FakeNvml

NO_GPU = not Path("/proc/driver/nvidia/version").exists()
MIB = 1 << 20


def sampled(nvml: FakeNvml, times: int = 3, budget_bytes: int | None = None) -> Recording:
    """A look at the start, `times` in between and one at the end; none by the thread."""
    with Sampler(NvmlProbe(BUS_ID, nvml=nvml), interval_s=60, budget_bytes=budget_bytes) as sampler:
        for _ in range(times):
            sampler.sample()
    return sampler.recording


# An NVIDIA GPU


def test_fake_has_nothing_that_the_real_library_lacks():
    real = pytest.importorskip("pynvml")
    names = [name for name in dir(FakeNvml) if name.lower().startswith("nvml")]
    assert [name for name in names if not hasattr(real, name)] == []
    for name in ("NVML_CLOCK_SM", "NVML_CLOCK_MEM", "NVML_TEMPERATURE_GPU"):
        assert getattr(real, name) == getattr(FakeNvml, name)


def test_a_gpu_that_tells_everything():
    nvml = FakeNvml(used=(1000, 1400, 1200))
    found = sampled(nvml)
    first = found.samples[0]
    assert first == Sample(first.time_s, 300, 1000, 8000, 91.0, 47.0, 1695, 9751, 217.5, 61)
    assert (found.peak_bytes, found.peak.source) == (300, nvml_probe.OWN)
    assert (found.device_before_bytes, found.device_peak_bytes) == (1000, 1400)
    assert len(found.samples) == 5
    assert [s.time_s for s in found.samples] == sorted(s.time_s for s in found.samples)
    assert nvml.open == 0, "shut down"


def test_a_process_in_both_lists_counts_once():
    nvml = FakeNvml()
    nvml.graphics = nvml.compute
    assert sampled(nvml).peak_bytes == 300


def test_a_process_that_is_listed_once_it_uses_the_gpu():
    nvml = FakeNvml()
    held = iter([[], [(os.getpid(), 500)], [(os.getpid(), 200)]])
    nvml.compute = lambda: next(held, [(os.getpid(), 100)])
    found = sampled(nvml)
    assert memory_of(found.samples) == [0, 500, 200, 100, 100]
    assert (found.before_bytes, found.peak_bytes) == (0, 500)


CONTAINERS = {
    "an empty list": [],
    "another namespace's process": [(os.getpid() + 1, 700)],
    "no memory": [(os.getpid(), None)],
}


@pytest.mark.parametrize("listed", CONTAINERS.values(), ids=CONTAINERS)
def test_in_a_container_the_change_of_the_device_stands_in(listed: list[tuple[int, int | None]]):
    nvml = FakeNvml(used=(1000, 1700, 900))
    nvml.compute = lambda: listed
    found = sampled(nvml)
    assert {s.process_bytes for s in found.samples} == {None}
    assert (found.before_bytes, found.peak_bytes, found.peak.source) == (0, 700, nvml_probe.CHANGE)


@pytest.mark.parametrize("error", ["NotSupported", "NoPermission", "FunctionNotFound"])
def test_what_a_gpu_does_not_support_is_asked_for_once(error: str):
    nvml = FakeNvml()
    missing = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetClockInfo 2")
    missing += ("nvmlDeviceGetComputeRunningProcesses",)
    nvml.fails = dict.fromkeys(missing, getattr(fake_nvml, f"NVMLError_{error}")())
    for sample in sampled(nvml).samples:
        assert (sample.power_w, sample.utilisation_percent, sample.memory_utilisation_percent) == (None,) * 3
        assert (sample.memory_clock_mhz, sample.sm_clock_mhz) == (None, 1695)
        assert sample.process_bytes is None
    assert {nvml.asked[name] for name in missing} == {1}
    assert nvml.asked["nvmlDeviceGetTemperature"] == 5


def test_a_driver_that_is_missing_is_a_user_error():
    nvml = FakeNvml()
    nvml.fails = {"nvmlInit": fake_nvml.NVMLError("Driver Not Loaded")}
    with pytest.raises(BackendError, match="Driver Not Loaded") as caught:
        NvmlProbe(nvml=nvml)
    assert "driver" in caught.value.fix


def test_a_library_that_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    with pytest.raises(BackendError, match=r"fastvar-runtime\[nvml\]"):
        NvmlProbe()


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_driver_the_real_library_says_so():
    pytest.importorskip("pynvml")
    with pytest.raises(BackendError, match="NVML does not answer"):
        NvmlProbe()
    pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(BackendError, match="no NVIDIA driver"):
        sampler_for("cuda")


def test_a_gpu_that_is_lost_is_told_at_the_end():
    nvml = FakeNvml()
    asked = threading.Event()

    def lost() -> list[tuple[int, int | None]]:
        if threading.current_thread() is threading.main_thread():
            return []
        asked.set()
        raise fake_nvml.NVMLError("GPU is lost")

    nvml.compute = lost
    with (
        pytest.raises(BackendError, match="GPU is lost"),
        Sampler(NvmlProbe(nvml=nvml), interval_s=0.001),
    ):
        assert asked.wait(5)
    assert nvml.open == 0


def test_bus_id_of_the_gpu_that_engines_run_on():
    """NVML counts GPUs in another order than CUDA, so they are told apart by their place."""
    driver = FakeDriver()
    assert first_gpu_bus_id(driver) == BUS_ID
    assert "cuDevicePrimaryCtxRetain" not in driver.calls, "a context takes memory"
    driver = FakeDriver(gpus=0)
    with pytest.raises(BackendError):
        first_gpu_bus_id(driver)


# The thread


class Counting(Probe):
    """Memory that grows by one at every look; fails at the look `fails_at`."""

    def __init__(self, fails_at: int = 10**9) -> None:
        self.looks, self.fails_at, self.closed = 0, fails_at, 0
        self.failed = threading.Event()

    def sample(self, time_s: float) -> Sample:
        self.looks += 1
        if self.looks == self.fails_at:
            self.failed.set()
            raise ZeroDivisionError("in the thread")
        return Sample(time_s, process_bytes=self.looks)

    def peak(self, samples: Sequence[Sample]) -> Peak:
        return Peak(max(memory_of(samples)), "counted")

    def close(self) -> None:
        self.closed += 1


def test_the_thread_samples_by_itself():
    with Sampler(Counting(), interval_s=0.001) as sampler:
        while sampler.sample().process_bytes < 20:
            time.sleep(0.001)
    found = sampler.recording
    assert [s.process_bytes for s in found.samples] == list(range(1, len(found.samples) + 1)), "none lost, in order"
    assert found.peak_bytes == len(found.samples)
    assert not any("sampler" in thread.name for thread in threading.enumerate()), "it is gone"


def test_the_thread_never_dies_silently():
    probe = Counting(fails_at=2)
    with pytest.raises(ZeroDivisionError, match="in the thread"), Sampler(probe, interval_s=0.001):
        assert probe.failed.wait(5)
    assert probe.closed == 1


def test_a_failure_of_the_block_is_not_hidden_by_the_threads(caplog: pytest.LogCaptureFixture):
    probe = Counting(fails_at=2)

    def block() -> None:
        assert probe.failed.wait(5)
        raise KeyError("block")

    with pytest.raises(KeyError, match="block"), Sampler(probe, interval_s=0.001):
        block()
    assert "in the thread" in caplog.text
    assert probe.closed == 1


def test_a_device_that_fails_at_the_first_look_is_given_back():
    probe = Counting(fails_at=1)
    with pytest.raises(ZeroDivisionError), Sampler(probe):
        pytest.fail("entered")
    assert probe.closed == 1


# The budget


@pytest.mark.parametrize(("budget", "over", "headroom"), [(None, None, None), (301, False, 1), (299, True, -1)])
def test_peak_against_a_budget(budget: int | None, over: bool | None, headroom: int | None):
    found = sampled(FakeNvml(), budget_bytes=budget)
    assert (found.over_budget, found.headroom_bytes) == (over, headroom)


def test_a_budget_that_is_just_met_is_not_exceeded():
    assert sampled(FakeNvml(), budget_bytes=300).over_budget is False


# The CPU


def status(folder: Path, rss_kib: int, peak_kib: int) -> None:
    (folder / "self").mkdir(exist_ok=True)
    (folder / "self" / "status").write_text(f"Name:\tx\nVmHWM:\t{peak_kib:8} kB\nVmRSS:\t{rss_kib:8} kB\n")
    (folder / "meminfo").write_text("MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    400 kB\n")


def host(folder: Path, *figures: tuple[int, int]) -> Recording:
    """One look for each (resident, highest) in KiB, the last also at the end."""
    status(folder, *figures[0])
    with Sampler(HostProbe(folder), interval_s=60) as sampler:
        for rss, peak in figures[1:]:
            status(folder, rss, peak)
            sampler.sample()
    return sampler.recording


def test_host_takes_the_kernels_count_where_it_could_be_reset(tmp_path: Path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "clear_refs").touch()
    found = host(tmp_path, (10, 10), (12, 25), (11, 25))
    assert (tmp_path / "self" / "clear_refs").read_text() == "5"
    assert [s.process_bytes for s in found.samples] == [10 << 10, 12 << 10, 11 << 10, 11 << 10]
    assert (found.samples[0].device_used_bytes, found.samples[0].device_total_bytes) == (600 << 10, 1000 << 10)
    assert (found.peak_bytes, found.peak.source) == (25 << 10, host_probe.COUNTED)


@pytest.mark.parametrize(("peak", "expected", "source"), [(90, 12, "SAMPLED"), (95, 95, "COUNTED")])
def test_host_trusts_an_old_count_only_where_it_rose(tmp_path: Path, peak: int, expected: int, source: str):
    """Without permission to reset it, 90 KiB may be from long before the start."""
    (tmp_path / "self" / "clear_refs").mkdir(parents=True)  # cannot be written
    found = host(tmp_path, (10, 90), (12, peak))
    assert (found.peak_bytes, found.peak.source) == (expected << 10, getattr(host_probe, source))


def test_host_without_a_process_file_system(tmp_path: Path):
    with Sampler(HostProbe(tmp_path / "none"), interval_s=60) as sampler:
        pass
    found = sampler.recording
    assert found.peak.source == host_probe.LIFETIME
    assert found.peak_bytes > MIB
    assert found.samples[0].device_total_bytes is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_host_sees_what_this_process_takes():
    with sampler_for("cpu", interval_s=0.001) as sampler:
        held = np.ones(512 * MIB, np.uint8)  # far more than what other threads of a test run give back meanwhile
        middle = sampler.sample()
        del held
    found = sampler.recording
    assert middle.process_bytes - found.before_bytes > 480 * MIB
    assert found.peak_bytes >= middle.process_bytes
    assert found.samples[-1].process_bytes < middle.process_bytes
