"""Fixtures of the tests of the CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastvar.core.tensors import TensorRef
from fastvar.engines.tensorrt import cuda_device as cuda
from fastvar.engines.tensorrt.cuda_device import CudaDevice
from tests.fakes.cuda import FakeDriver
from tests.fakes.cuda_gpu import memory, move

STAGING_BYTES = 64  # so that most copies are of several pieces
COUNT = 100  # float32 elements


@pytest.fixture
def small_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "STAGING_BYTES", STAGING_BYTES)


@pytest.fixture
def driver(small_staging: None) -> FakeDriver:
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
