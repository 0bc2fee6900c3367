"""The CUDA device on a fake driver that does nothing until it is waited for."""

from __future__ import annotations

import gc
import threading
import unittest.mock
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvar.engines import cuda
from fastvar.engines.base import TensorRef
from fastvar.engines.cuda import NO_DRIVER, CudaDevice, CudaError, GpuFacts
from fastvar.errors import BackendError, DeviceMemoryError
from tests.fake_cuda import CUresult, CUstream_flags, CUstreamCaptureMode, FakeDriver, memory, move

STAGING_BYTES = 64  # so that most copies are of several pieces
COUNT = 100  # float32 elements


@pytest.fixture(autouse=True)
def small_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "STAGING_BYTES", STAGING_BYTES)


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver(memory=1 << 20)


@pytest.fixture
def device(driver: FakeDriver) -> CudaDevice:
    return CudaDevice(module=driver)


class Buffers:
    """Tensors of float32 in one allocation, and launches that copy between them."""

    def __init__(self, device: CudaDevice, driver: FakeDriver, count: int = 3) -> None:
        self.held = device.allocate(512 * count)
        self.refs = [TensorRef(self.held.address + 512 * i, "float32", (COUNT,)) for i in range(count)]
        self._device, self._driver = device, driver

    def copy(self, source: int, target: int) -> Callable[[], None]:
        a, b = self.refs[source].address, self.refs[target].address

        def launch() -> None:
            touched = ((a, 4 * COUNT), (b, 4 * COUNT))
            self._driver.enqueue(self._device.stream_address, lambda: move(b, a, 4 * COUNT), touched)

        return launch

    def add_one(self, position: int) -> Callable[[], None]:
        address = self.refs[position].address

        def add() -> None:
            memory(address, 4 * COUNT).view(np.float32)[:] += 1

        return lambda: self._driver.enqueue(self._device.stream_address, add, ((address, 4 * COUNT),))


@pytest.fixture
def buffers(device: CudaDevice, driver: FakeDriver) -> Buffers:
    return Buffers(device, driver)


# The fake itself


def test_fake_has_nothing_that_the_real_driver_lacks():
    real = pytest.importorskip("cuda.bindings.driver")
    functions = {name for name in vars(FakeDriver) if name.startswith("cu")}
    assert {name for name in functions if not hasattr(real, name)} == set()
    for mine in (CUresult, CUstreamCaptureMode, CUstream_flags):
        for member in mine:
            assert int(getattr(getattr(real, mine.__name__), member.name)) == member
    for name in ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR"):
        assert int(getattr(real.CUdevice_attribute, name)) == getattr(FakeDriver.CUdevice_attribute, name)


def test_fake_does_nothing_before_somebody_waits(device: CudaDevice, buffers: Buffers):
    device.write(buffers.refs[0], np.float32(5))
    assert not (memory(buffers.refs[0].address, 4 * COUNT).view(np.float32) == 5).all()
    device.wait()
    assert (memory(buffers.refs[0].address, 4 * COUNT).view(np.float32) == 5).all()


def test_fake_refuses_copies_outside_of_an_allocation(device: CudaDevice, buffers: Buffers):
    beyond = replace(buffers.refs[2], address=buffers.refs[2].address + 256)
    with pytest.raises(CudaError, match="cuMemcpyHtoDAsync failed"):
        device.write(beyond, np.zeros(COUNT))
    with pytest.raises(CudaError, match="cuMemcpyDtoHAsync failed"):
        device.read(beyond)


def test_fake_notices_memory_that_is_used_after_it_is_freed(device: CudaDevice, driver: FakeDriver):
    buffers = Buffers(device, driver)
    recorded = device.record([buffers.copy(0, 1)])
    buffers.held = None
    recorded()
    with pytest.raises(CudaError, match="illegal address"):
        device.wait()
    driver.recover()


# Memory


@pytest.mark.parametrize("count", [1, 15, 16, 17, 64, 100], ids="{} floats".format)
def test_what_is_written_is_read_back(device: CudaDevice, buffers: Buffers, count: int):
    """Fewer bytes than the staging buffer, as many, and so many that the ring of buffers goes round."""
    ref = replace(buffers.refs[0], shape=(count,))
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    device.write(ref, values)
    np.testing.assert_array_equal(device.read(ref), values)
    rest = replace(ref, address=ref.address + 4 * count, shape=(128 - count,))
    assert not device.read(rest).any(), "nothing behind it is written"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (3, np.full((4, 5), 3.0)),
        (np.zeros(1), np.zeros((4, 5))),
        (np.arange(5), np.tile(np.arange(5.0), (4, 1))),
        (np.arange(20.0).reshape(5, 4).T, np.arange(20.0).reshape(5, 4).T),
    ],
    ids=["scalar", "one", "row", "strided"],
)
def test_values_are_broadcast_and_converted(device: CudaDevice, buffers: Buffers, values, expected: np.ndarray):
    ref = replace(buffers.refs[0], shape=(4, 5))
    device.write(ref, np.float32(9))
    device.write(ref, np.asarray(values))
    np.testing.assert_array_equal(device.read(ref), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("bfloat16", np.array([[0x3F80, 0xC000], [0x7F80, 0x0001]], np.uint16)),
        ("float8_e4m3fn", np.array([[0x38, 0x7E], [0x80, 0x01]], np.uint8)),
        ("bool", np.array([[True, False], [False, True]])),
        ("int64", np.array([[1, -(2**40)], [0, 2**62]])),
        ("float16", np.array([[1.5, -2], [0, 65504]], np.float16)),
    ],
)
def test_every_element_type_keeps_its_bits(device: CudaDevice, buffers: Buffers, dtype: str, values: np.ndarray):
    ref = TensorRef(buffers.held.address, dtype, (2, 2))
    device.write(ref, values)
    found = device.read(ref)
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_scalar_tensor(device: CudaDevice, buffers: Buffers):
    ref = replace(buffers.refs[0], shape=())
    device.write(ref, np.asarray(0.5))
    assert device.read(ref).shape == ()
    assert device.read(ref) == 0.5


def test_memory_is_zeroed_and_aligned(device: CudaDevice):
    for size in (1, 255, 1000):
        held = device.allocate(size)
        assert held.address % 256 == 0
        assert held.size_bytes == size
        assert not device.read(TensorRef(held.address, "uint8", (size,))).any()


def test_no_memory_at_all_is_a_valid_allocation(device: CudaDevice):
    assert device.allocate(0).size_bytes == 0


def test_array_may_be_changed_right_after_it_is_written(device: CudaDevice, buffers: Buffers):
    values = np.arange(COUNT, dtype=np.float32)
    device.write(buffers.refs[0], values)
    values[:] = -1
    np.testing.assert_array_equal(device.read(buffers.refs[0]), np.arange(COUNT))


def test_what_was_read_is_a_copy(device: CudaDevice, buffers: Buffers):
    device.write(buffers.refs[0], np.float32(1))
    first = device.read(buffers.refs[0])
    device.write(buffers.refs[0], np.float32(2))
    device.wait()
    assert (first == 1).all()


def test_free_bytes_are_what_is_left(device: CudaDevice):
    assert device.free_bytes() == 1 << 20
    held = device.allocate(1 << 19)
    assert device.free_bytes() == 1 << 19
    del held
    assert device.free_bytes() == 1 << 20


# Order and waiting


def test_writes_and_launches_run_in_the_order_they_were_given(device: CudaDevice, buffers: Buffers):
    a, b, c = buffers.refs
    device.write(a, np.float32(1))
    buffers.copy(0, 1)()
    device.write(a, np.float32(2))
    buffers.copy(0, 2)()
    device.write(a, np.float32(3))
    assert [device.read(ref)[-1] for ref in (a, b, c)] == [3, 1, 2]


def test_only_reading_waits(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    before = driver.count["cuStreamSynchronize"]
    for value in range(10):
        device.write(buffers.refs[0], np.float32(value))
        buffers.copy(0, 1)()
        device.mark()
    assert driver.count["cuStreamSynchronize"] == before
    device.read(replace(buffers.refs[1], shape=(STAGING_BYTES // 4,)))
    assert driver.count["cuStreamSynchronize"] == before + 1


def test_full_ring_waits_for_its_oldest_copy_only(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    small = replace(buffers.refs[0], shape=(1,))
    for value in range(cuda.STAGING_BUFFERS):
        device.write(small, np.float32(value))
    assert memory(small.address, 4).view(np.float32) != 0, "not even the memory is zeroed yet"
    device.write(small, np.float32(9))
    assert memory(small.address, 4).view(np.float32) == 0, "the first copy is done, the others are not"


def test_time_between_marks(device: CudaDevice, buffers: Buffers):
    start = device.mark()
    buffers.copy(0, 1)()
    end = device.mark()
    with pytest.raises(CudaError, match="not ready"):
        device.elapsed_ms(start, end)
    device.wait()
    assert 0 <= device.elapsed_ms(start, end) < 1e4


# Recording


def test_recorded_launches_run_once_and_then_whenever_they_are_launched(device: CudaDevice, buffers: Buffers):
    recorded = device.record([buffers.add_one(0), buffers.copy(0, 1)])
    assert device.read(buffers.refs[1])[0] == 1, "libraries set themselves up in the first run; capturing runs nothing"
    for expected in (2, 3):
        recorded()
        assert device.read(buffers.refs[0])[0] == device.read(buffers.refs[1])[0] == expected


def test_recording_keeps_order_among_other_launches(device: CudaDevice, buffers: Buffers):
    recorded = device.record([buffers.copy(0, 1), buffers.copy(1, 2)])
    device.write(buffers.refs[0], np.float32(4))
    recorded()
    device.write(buffers.refs[0], np.float32(5))
    buffers.copy(0, 1)()
    assert [device.read(ref)[0] for ref in buffers.refs] == [5, 5, 4]


def test_recording_is_one_launch(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    recorded = device.record([buffers.add_one(0)] * 5)
    driver.calls.clear()
    recorded()
    assert driver.calls == ["cuGraphLaunch"]


def test_nothing_waits_during_a_capture(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    device.record([buffers.add_one(0), buffers.copy(0, 1)])
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
        device.record([buffers.add_one(0), failing_second_time(buffers.add_one(1), BackendError("broken"))])
    assert device.read(buffers.refs[0])[0] == 1, "the stream is back in order"
    device.record([buffers.add_one(0)])()
    assert device.read(buffers.refs[0])[0] == 3


def test_failed_recording_leaves_no_graph(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    with pytest.raises(BackendError, match="broken"):
        device.record([failing_second_time(buffers.add_one(0), BackendError("broken"))])
    driver.failing["cuGraphInstantiate"] = CUresult.CUDA_ERROR_UNKNOWN
    with pytest.raises(CudaError, match="cuGraphInstantiate"):
        device.record([buffers.add_one(0)])
    assert "graphs" not in driver.alive()


def test_error_of_a_launch_is_told_though_the_capture_is_lost_with_it(device: CudaDevice, buffers: Buffers):
    def waits() -> None:
        buffers.add_one(0)()
        device.wait()

    with pytest.raises(CudaError, match="cuStreamSynchronize failed"):
        device.record([waits])
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
        device.record([collects])()
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
    recorded, mark = device.record([buffers.add_one(0)]), device.mark()
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
        recorded = device.record([buffers.add_one(0)])
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


# Start


@pytest.mark.parametrize(
    ("driver", "named"),
    [
        (FakeDriver(installed=False), r"no NVIDIA driver is installed"),
        (FakeDriver(gpus=0), r"no NVIDIA GPU is visible"),
        (FakeDriver(version=12090), r"the NVIDIA driver is too old: it runs CUDA 12\.9"),
    ],
    ids=["no driver", "no GPU", "too old"],
)
def test_machine_without_what_is_needed(driver: FakeDriver, named: str):
    with pytest.raises(BackendError, match=named) as error:
        CudaDevice((13, 0), driver)
    assert "\n" not in error.value.problem
    assert driver.alive() == {}


def test_driver_too_old_says_which_will_do():
    with pytest.raises(BackendError) as error:
        CudaDevice((13, 1), FakeDriver(version=13000))
    assert "13.1 or newer" in error.value.expected
    assert "update" in error.value.fix


@pytest.mark.parametrize("version", [13000, 13010, 14000])
def test_driver_that_is_new_enough(version: int):
    assert CudaDevice((13, 0), FakeDriver(version=version)).facts().driver_cuda == (version // 1000, version // 10 % 10)


def test_driver_that_does_not_start_says_why():
    driver = FakeDriver()
    driver.failing["cuInit"] = CUresult.CUDA_ERROR_UNKNOWN
    with pytest.raises(BackendError, match=r"does not start: .*CUDA_ERROR_UNKNOWN"):
        CudaDevice(module=driver)


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is an NVIDIA GPU")
def test_real_driver_is_not_here():
    pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(BackendError) as error:
        CudaDevice()
    assert error.value.problem in (NO_DRIVER, "no NVIDIA GPU is visible")


@pytest.mark.parametrize(("capability", "name"), [((8, 6), "sm86"), ((12, 0), "sm120")])
def test_facts(capability: tuple[int, int], name: str):
    driver = FakeDriver(capability=capability, memory=24 << 30, version=13020, name="NVIDIA GeForce RTX 3090")
    assert CudaDevice(module=driver).facts() == GpuFacts("NVIDIA GeForce RTX 3090", name, (13, 2), 24 << 30)


def test_failed_call_names_function_and_reason(device: CudaDevice, driver: FakeDriver):
    driver.failing["cuStreamSynchronize"] = CUresult.CUDA_ERROR_UNKNOWN
    with pytest.raises(CudaError, match=r"^cuStreamSynchronize failed: error unknown \(CUDA_ERROR_UNKNOWN\)$"):
        device.wait()


def test_every_thread_enters_the_context_once(device: CudaDevice, driver: FakeDriver, buffers: Buffers):
    found: list[float] = []

    def use(value: int) -> None:
        device.write(buffers.refs[value], np.float32(value))
        found.append(float(device.read(buffers.refs[value])[0]))

    threads = [threading.Thread(target=use, args=(value,)) for value in (1, 2)]
    for thread in threads:  # one after the other: a device is used by one thread at a time
        thread.start()
        thread.join(10)
    assert found == [1, 2]
    assert len(driver.contexts) == len(threads) + 1


def test_memory_may_be_freed_by_another_thread(device: CudaDevice, driver: FakeDriver):
    held = [device.allocate(100)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join(10)
    assert "allocations" not in driver.alive()
