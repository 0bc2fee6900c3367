"""The GPU that is not there tells what its generation does, and refuses what CUDA refuses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from fastvar.engines.aotinductor.gpus import GPUS

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


CAPTURE = """
import ctypes, sys, torch
runtime = ctypes.CDLL(None)
runtime.stand_in_launches.restype = ctypes.c_long
x, before = torch.zeros(4, device="cuda"), torch.cuda.Event()
before.record()
print(before.query())
graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
counts = [runtime.stand_in_launches()]
refused = []
with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
    x += 1
    x *= 2
    for ask in (before.query, before.synchronize, stream.synchronize):
        try:
            ask()
        except RuntimeError as error:
            refused.append("captur" in str(error))
counts.append(runtime.stand_in_launches())
graph.replay()
graph.replay()
counts.append(runtime.stand_in_launches())
print(refused, counts[1] - counts[0], counts[2] - counts[1])
"""


def test_a_capture_runs_nothing_refuses_questions_and_is_replayed(on_gpu: Callable[..., str]):
    """Neither an event nor the stream itself is asked during a capture; two kernels, replayed twice, are four."""
    assert on_gpu(CAPTURE).splitlines() == ["True", "[True, True, True] 0 4"]
