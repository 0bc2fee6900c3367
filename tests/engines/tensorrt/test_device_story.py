"""The fake driver tells of a GPU what its stand-in for compiled programs tells (tests/cuda/test_stand_in.py)."""

from __future__ import annotations

from fastvar.engines.tensorrt.cuda_device import CudaDevice
from tests.fakes.cuda import FakeDriver
from tests.fakes.device_story import STORY, tell


def test_the_fake_driver_tells_the_story(device: CudaDevice, driver: FakeDriver):
    ran: list[None] = []

    def kernel() -> None:
        driver.enqueue(device.stream_address, lambda: ran.append(None), ())

    assert tell(device, kernel, lambda: len(ran)) == STORY
