"""The GPU that is not there tells what its generation does, and refuses what CUDA refuses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from fastvar.engines.aotinductor.gpus import GPUS
from tests.fakes.device_story import STORY

FACTS = """
import json, torch
p = torch.cuda.get_device_properties(0)
print(json.dumps([torch.cuda.device_count(), p.name, p.major, p.minor, p.multi_processor_count, p.L2_cache_size,
    p.max_threads_per_multi_processor, p.shared_memory_per_block_optin, p.shared_memory_per_multiprocessor]))
"""


@pytest.mark.parametrize("name", GPUS)
def test_a_process_finds_the_gpu_of_the_table(on_gpu: Callable[..., str], name: str):
    gpu, digits = GPUS[name], name.removeprefix("sm")
    facts = [1, gpu.name, int(digits[:-1]), int(digits[-1]), gpu.processors, gpu.l2_bytes]
    memory = [gpu.shared_block_bytes, gpu.shared_processor_bytes]
    assert json.loads(on_gpu(FACTS, capability=name)) == [*facts, gpu.threads, *memory]


COPIES = """
import torch
sent = torch.arange(100000, dtype=torch.int32)
held = sent.to("cuda")
assert held.device == torch.device("cuda", 0) and held.data_ptr() % 512 == 0
print(torch.equal(held.cpu(), sent), torch.equal(held.clone().cpu(), sent))
"""


def test_memory_comes_back_as_it_went(on_gpu: Callable[..., str]):
    assert on_gpu(COPIES).split() == ["True", "True"]


UNTOUCHED = """
import torch
from pathlib import Path

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS"))

torch.zeros(1, device="cuda")
before = resident()
for _ in range(2):
    held = [torch.empty(1 << 28, dtype=torch.uint8, device="cuda") for _ in range(4)]
    print(resident() - before, held[3][-4:].cpu().tolist())
    held = None
    torch.cuda.empty_cache()
"""


def test_memory_that_nobody_writes_to_takes_none_of_the_host(on_gpu: Callable[..., str]):
    """A compiler allocates what a program works on, gigabytes for a decoder. It is zero all the same."""
    for line in on_gpu(UNTOUCHED).splitlines():
        grown, values = line.split(" ", 1)
        assert int(grown) < 64 << 20
        assert json.loads(values) == [0, 0, 0, 0]


REFUSALS = """
import torch
refused = []
for name in ("query", "synchronize", "stream"):
    x, before, stream = torch.zeros(4, device="cuda"), torch.cuda.Event(), torch.cuda.Stream()
    before.record()
    assert before.query()
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
            x += 1
            stream.synchronize() if name == "stream" else getattr(before, name)()
    except RuntimeError as error:
        refused.append(["captur" in str(told) for told in (error.__context__, error)])  # the call, the capture's end
print(refused)
"""


def test_a_capture_that_asks_is_refused_and_lost(on_gpu: Callable[..., str]):
    """Neither an event nor the stream itself is asked during a capture."""
    assert on_gpu(REFUSALS).splitlines() == [str([[True, True]] * 3)]


TELL = """
import ctypes, json, torch
from fastvar.engines.aotinductor.cuda_device import TorchCudaDevice
from tests.fakes.device_story import tell
runtime = ctypes.CDLL(None)
runtime.stand_in_launches.restype = ctypes.c_long
device = TorchCudaDevice(torch)
x = torch.zeros(4, device="cuda")

def kernel():
    with device.stream():
        x.add_(1)

print(json.dumps([tell(device, kernel, runtime.stand_in_launches), list(vars(device.gpu_facts()).values())]))
"""


def test_the_stand_in_tells_the_story(on_gpu: Callable[..., str]):
    """The same as the driver's fake does, and the facts of its GPU as a device tells them."""
    told, facts = json.loads(on_gpu(TELL))
    assert told == STORY
    assert facts == [GPUS["sm90"].name, "sm90", None, 24 << 30]
