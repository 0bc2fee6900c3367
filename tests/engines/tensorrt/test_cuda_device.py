"""The CUDA device on a fake driver that does nothing until it is waited for."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvar.core.tensors import TensorRef
from fastvar.engines.tensorrt import cuda_device as cuda
from fastvar.engines.tensorrt.cuda_device import NO_DRIVER, CudaDevice, CudaError, GpuFacts
from fastvar.errors import BackendError
from tests.engines.conftest import COUNT, STAGING_BYTES, Buffers
from tests.fakes.cuda import FakeDriver
from tests.fakes.cuda_gpu import memory
from tests.fakes.cuda_handles import CUresult, CUstream_flags, CUstreamCaptureMode

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
    recorded = device.capture_graph([buffers.copy(0, 1)])
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
        device.record_event()
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
    start = device.record_event()
    buffers.copy(0, 1)()
    end = device.record_event()
    with pytest.raises(CudaError, match="not ready"):
        device.elapsed_ms(start, end)
    device.wait()
    assert 0 <= device.elapsed_ms(start, end) < 1e4


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
    assert CudaDevice((13, 0), FakeDriver(version=version)).gpu_facts().driver_cuda == (
        version // 1000,
        version // 10 % 10,
    )


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
    assert CudaDevice(module=driver).gpu_facts() == GpuFacts("NVIDIA GeForce RTX 3090", name, (13, 2), 24 << 30)


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
