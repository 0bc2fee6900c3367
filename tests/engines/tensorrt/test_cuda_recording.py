"""Recorded launches of the CUDA device, and who frees what, on a fake driver."""

from __future__ import annotations

import gc
import unittest.mock
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from fastvar.engines.tensorrt import cuda_device as cuda
from fastvar.engines.tensorrt.cuda_device import CudaDevice, CudaError
from fastvar.errors import BackendError, DeviceMemoryError
from tests.engines.conftest import Buffers
from tests.fakes.cuda import FakeDriver
from tests.fakes.cuda_handles import CUresult

# Recording


def test_recorded_launches_run_once_and_then_whenever_they_are_launched(device: CudaDevice, buffers: Buffers):
    recorded = device.capture_graph([buffers.add_one(0), buffers.copy(0, 1)])
    assert device.read(buffers.refs[1])[0] == 1, "libraries set themselves up in the first run; capturing runs nothing"
    for expected in (2, 3):
        recorded()
        assert device.read(buffers.refs[0])[0] == device.read(buffers.refs[1])[0] == expected


def test_recording_keeps_order_among_other_launches(device: CudaDevice, buffers: Buffers):
    recorded = device.capture_graph([buffers.copy(0, 1), buffers.copy(1, 2)])
    device.write(buffers.refs[0], np.float32(4))
    recorded()
    device.write(buffers.refs[0], np.float32(5))
    buffers.copy(0, 1)()
    assert [device.read(ref)[0] for ref in buffers.refs] == [5, 5, 4]


def test_recording_is_one_launch(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    recorded = device.capture_graph([buffers.add_one(0)] * 5)
    driver.calls.clear()
    recorded()
    assert driver.calls == ["cuGraphLaunch"]


def test_nothing_waits_during_a_capture(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    device.capture_graph([buffers.add_one(0), buffers.copy(0, 1)])
    begin, end = driver.calls.index("cuStreamBeginCapture"), driver.calls.index("cuStreamEndCapture")
    assert driver.calls[begin + 1 : end] == ["enqueue", "enqueue"]


def failing_second_time(launch: Callable[[], None], error: Exception) -> Callable[[], None]:
    """Fails while it is captured, not in the run before."""
    runs: list[None] = []

    def run() -> None:
        runs.append(None)
        launch()
        if len(runs) == 2:
            raise error

    return run


def test_launch_that_fails_while_it_is_captured_ends_the_capture(device: CudaDevice, buffers: Buffers):
    with pytest.raises(BackendError, match="broken"):
        device.capture_graph([buffers.add_one(0), failing_second_time(buffers.add_one(1), BackendError("broken"))])
    assert device.read(buffers.refs[0])[0] == 1, "the stream is back in order"
    device.capture_graph([buffers.add_one(0)])()
    assert device.read(buffers.refs[0])[0] == 3


def test_failed_recording_leaves_no_graph(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    with pytest.raises(BackendError, match="broken"):
        device.capture_graph([failing_second_time(buffers.add_one(0), BackendError("broken"))])
    driver.failing["cuGraphInstantiate"] = CUresult.CUDA_ERROR_UNKNOWN
    with pytest.raises(CudaError, match="cuGraphInstantiate"):
        device.capture_graph([buffers.add_one(0)])
    assert "graphs" not in driver.alive()


def test_error_of_a_launch_is_told_though_the_capture_is_lost_with_it(device: CudaDevice, buffers: Buffers):
    def waits() -> None:
        buffers.add_one(0)()
        device.wait()

    with pytest.raises(CudaError, match="cuStreamSynchronize failed"):
        device.capture_graph([waits])
    assert device.read(buffers.refs[0])[0] == 1


def test_garbage_collected_during_a_capture_does_not_spoil_it(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    """An old pipeline in a reference cycle, say: a thread that captures may not free memory."""
    garbage: list[object] = [device.allocate(100)]
    garbage.append(garbage)
    runs: list[None] = []

    def collects() -> None:
        buffers.add_one(0)()
        runs.append(None)
        if len(runs) == 2:
            gc.collect()

    gc.collect()
    gc.disable()
    try:
        del garbage
        device.capture_graph([collects])()
    finally:
        gc.enable()
    assert device.read(buffers.refs[0])[0] == 2
    gc.collect()
    assert driver.alive()["allocations"] == 1


# Owners


def test_everything_is_freed_with_its_owner(driver: FakeDriver):
    device = CudaDevice(module=driver)
    assert driver.alive() == {"streams": 1}, "who only asks for facts pins no memory"
    buffers = Buffers(device, driver)
    for _ in range(2 * cuda.STAGING_BUFFERS):
        device.write(buffers.refs[0], np.zeros(buffers.refs[0].shape, buffers.refs[0].dtype))
    bare = {"pinned": cuda.STAGING_BUFFERS, "streams": 1, "events": cuda.STAGING_BUFFERS}
    recorded, mark = device.capture_graph([buffers.add_one(0)]), device.record_event()
    assert driver.alive() == {**bare, "allocations": 1, "executables": 1, "events": cuda.STAGING_BUFFERS + 1}
    del recorded, mark, buffers
    gc.collect()
    assert driver.alive() == bare
    del device
    gc.collect()
    assert driver.alive() == {}


def test_owners_are_freed_without_the_garbage_collector(driver: FakeDriver):
    gc.disable()
    try:
        device = CudaDevice(module=driver)
        buffers = Buffers(device, driver)
        recorded = device.capture_graph([buffers.add_one(0)])
        found = weakref.ref(device)
        del recorded, buffers, device
        assert found() is None
        assert driver.alive() == {}
    finally:
        gc.enable()


def test_memory_freed_while_it_is_in_use_is_freed_after_its_use(device: CudaDevice, driver: FakeDriver):
    buffers = Buffers(device, driver)
    device.write(buffers.refs[0], np.float32(1))
    buffers.copy(0, 1)()
    del buffers
    gc.collect()
    device.wait()
    assert "allocations" not in driver.alive()


def test_broken_gpu_is_told_once_and_not_again_by_everything_that_is_freed(driver: FakeDriver):
    device = CudaDevice(module=driver)
    held = device.allocate(100)
    driver.failing |= dict.fromkeys(("cuMemFree", "cuMemFreeHost", "cuEventDestroy"), CUresult.CUDA_ERROR_UNKNOWN)
    with unittest.mock.patch("sys.unraisablehook") as hook:
        del held, device
        gc.collect()
    assert [call.args[0].exc_value for call in hook.call_args_list] == []


def test_out_of_memory_is_an_error_of_its_own(device: CudaDevice, driver: FakeDriver):
    held = device.allocate(1 << 19)
    with pytest.raises(DeviceMemoryError, match="out of memory"):
        device.allocate((1 << 19) + 1)
    assert driver.alive()["allocations"] == 1
    assert device.allocate(1 << 19).size_bytes == held.size_bytes, "it can go on with less"
