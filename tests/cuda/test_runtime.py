"""The whole runtime on a GPU that is not there: placement, streams, captures, replays, copies, release."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastvar.export.build import build_bundle
from fastvar.export.toolchain import toolchain_of
from tests.cuda import models

# Draws an image twice, graphs on or off. For each scale: launches of engines, and kernels that they launch. Then a
# release of everything: what torch still holds.
DRAW = """
import ctypes, gc, json, sys, torch
from fastvar.core.noise import seeded_noise
from fastvar.engines.bundle.bundle import Bundle
from fastvar.profiling.profiled_bundle import random_features
from fastvar.runtime.requests.inputs import LabelInput, TextInput
from fastvar.runtime.session import Session
from fastvar.runtime.requests.settings import default_settings

runtime = ctypes.CDLL(None)
runtime.stand_in_launches.restype = ctypes.c_long
bundle, graphs, captures = Bundle.open(sys.argv[1]), sys.argv[2] == "graphs", []
session = Session(bundle, cuda_graphs=graphs)
capture = session.device.capture_graph
session.device.capture_graph = lambda launches: captures.append(len(launches)) or capture(launches)
settings = default_settings(bundle.manifest)
workspace = session.workspace(2)
found = {"captures": captures, "plan": [len(calls.calls) for calls in workspace.layout.steps], "kernels": []}
for image in range(2):
    if bundle.manifest.text_length:
        features = random_features(bundle.manifest)
        workspace.set_features(features[0], features[1], (features.shape[1],) * 2)
    else:
        workspace.give(LabelInput(3))
    kernels, before = [], runtime.stand_in_launches()
    for calls, _ in workspace.run_scales(seeded_noise(5), settings):
        now = runtime.stand_in_launches()
        kernels.append(now - before)
        before = now
    workspace.decode()
    found["kernels"].append(kernels)
found["allocated"] = [torch.cuda.memory_allocated()]
del workspace, session, capture, calls
gc.collect()
torch._C._cuda_clearCublasWorkspaces()  # torch 2.11 counts them, and keeps them for the process
torch.cuda.empty_cache()
found["allocated"].append(torch.cuda.memory_allocated())
print(json.dumps(found))
"""


@pytest.fixture(params=models.SMALL)
def bundle(
    request: pytest.FixtureRequest, torch_of_cuda: Any, capability: str, program_cache: Path, tmp_path: Path
) -> Path:
    options = models.options(capability)
    checkpoint, plan = models.SMALL[request.param]()
    build_bundle(checkpoint, plan, tmp_path / "b", options, toolchain=toolchain_of(options), cache=program_cache)
    return tmp_path / "b"


def test_an_image_is_drawn_from_end_to_end(bundle: Path, capability: str, on_gpu: Callable[..., str]):
    on, off = (json.loads(on_gpu(DRAW, bundle, mode, capability=capability)) for mode in ("graphs", "launches"))
    scales = len(on["plan"])
    captured = [count for count in on["captures"] if count in on["plan"]]
    assert captured[-scales:] == on["plan"], "every scale is one graph, of as many launches as the plan has"
    assert off["captures"] == []
    assert on["kernels"][1] == on["kernels"][0] == off["kernels"][0] == off["kernels"][1], "a replay launches the same"
    assert all(kernels >= launches for kernels, launches in zip(on["kernels"][0], on["plan"], strict=True))
    assert on["allocated"][1] < on["allocated"][0] // 10, "memory goes with the session"


def test_nothing_that_is_drawn_on_a_stand_in_is_taken_for_an_image(
    bundle: Path, on_gpu: Callable[..., str], capability
):
    code = """
import sys, warnings
from fastvar import Pipeline
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    Pipeline.load(sys.argv[1])
print([str(w.message) for w in told if w.category.__name__ == "RehearsalWarning"])
"""
    assert "images and timings are nonsense" in on_gpu(code, bundle, capability=capability)
