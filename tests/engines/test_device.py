import numpy as np
import pytest

from fastvar.engines import device as device_module
from fastvar.engines.device import ALIGNMENT, HostDevice
from fastvar.errors import DeviceMemoryError


def test_memory_of_the_host_is_zeroed_and_aligned():
    held = HostDevice().allocate(1000)
    assert held.address % ALIGNMENT == 0
    assert held.size_bytes == 1000


def test_memory_that_cannot_be_had_is_told_in_words(monkeypatch):
    def refuse(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr(device_module.np, "zeros", refuse)
    with pytest.raises(DeviceMemoryError, match=r"2\.00 GiB of memory cannot be allocated"):
        HostDevice().allocate(2 << 30)
    assert np.zeros is refuse
