"""The GPU checklist, `make gpu`: the gpu tests, parity of GPU engines with onnxruntime, timings, one JSON of it all.

Needs an NVIDIA GPU and no network. Whatever fails is recorded under its name, and the rest goes on. Builds run in
processes of their own, so that what is timed shares its process with no torch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.contenders import EngineContender
from benchmarks.timing import Run, forced_logits, one_image
from fastvar.doctor import examine
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.tensorrt.backend import ANY, TensorRTRTXBackend
from fastvar.engines.tensorrt.cuda_device import CudaDevice, GpuFacts
from fastvar.errors import BuildError, FastvarError
from fastvar.profiling.profiled_bundle import random_features
from fastvar.profiling.sampler import sampler_for
from fastvar.runtime.memory.fit import device_need
from fastvar.runtime.memory.layout import build_layout
from fastvar.runtime.settings import SamplingSettings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GUIDED = SamplingSettings(guidance_scale=3.0, tau=1.0, top_p=0.97)
# Relative L2 error of the guided logits at any scale, against fp32 on the same bits.
TOLERANCES = {"bf16": 0.05, "fp16": 0.01}
# Sizes and policies that are timed, with random weights: they cost what trained ones do.
TIMED = (("1024x1024", "dense"), ("1024x1024", "fastvar"), ("2048x2048", "fastvar"))
WARM_UP, RUNS = 2, 7

Record = dict[str, Any]


def main(
    backend: Annotated[str, typer.Option(help="tensorrt-rtx or tensorrt.")] = "tensorrt-rtx",
    model: Annotated[str, typer.Option(help="Model size that is timed, with random weights.")] = "infinity_2b",
    out: Annotated[Path | None, typer.Option(help="JSON file; named by the GPU by default.")] = None,
) -> None:
    """Check a GPU machine, and write what was seen."""
    try:
        gpu = CudaDevice().facts()
    except FastvarError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    target = built_target(backend, gpu)
    record: Record = {
        "what": f"GPU checklist of fastvar: {backend}, target {target}, {model} with random weights, batch 1",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": vars(gpu),
        "machine": examine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(Path(folder), backend, target)
        for name, section in sections(builder, model):
            typer.echo(f"{name} ...")
            record[name] = attempt(section)
            typer.echo(json.dumps(record[name], indent=1)[-2000:])
    name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    path = out or RESULTS / f"gpu-{name}-{backend}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    failed = [name for name, found in record.items() if isinstance(found, dict) and not found.get("ok", True)]
    typer.echo(f"wrote {path}" + (f"; failed: {', '.join(failed)}" if failed else "; all passed"))
    raise typer.Exit(1 if failed else 0)


def sections(builder: Builder, model: str) -> Iterator[tuple[str, Callable[[], Record]]]:
    """Everything that is checked, by name."""
    yield "tests", run_tests
    for precision in TOLERANCES:
        yield f"parity {precision}", partial(parity, builder, precision)
    for size, policy in TIMED:
        yield f"timing {size} {policy}", partial(timing, builder, model, size, policy)


def attempt(section: Callable[[], Record]) -> Record:
    """A section's record; what stops it is recorded in its place."""
    try:
        return section()
    except Exception as error:  # noqa: BLE001 the checklist goes on, and the record says what happened
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def built_target(backend: str, gpu: GpuFacts) -> str:
    """The GPU's own name where the library lists it, else the mask of everything from sm80 on."""
    if backend != "tensorrt-rtx":
        return "current"
    known = TensorRTRTXBackend().known_targets()
    return gpu.capability if gpu.capability in known else ANY


class Builder:
    """Runs `fastvar build` in a process of its own."""

    def __init__(self, folder: Path, backend: str, target: str) -> None:
        self._folder, self._backend, self._target = folder, backend, target

    def gpu(self, name: str, *arguments: str) -> Bundle:
        """A bundle for the GPU."""
        return self._build(name, "--backend", self._backend, "--target", self._target, *arguments)

    def cpu(self, name: str, *arguments: str) -> Bundle:
        """The same in fp32 on onnxruntime."""
        return self._build(name, "--backend", "onnxruntime", *arguments)

    def like(self, bundle: Bundle, name: str, *arguments: str) -> Bundle:
        """Another policy or size of a bundle, which takes over its weights."""
        return self._run(name, "--from-bundle", str(bundle.path), *arguments)

    def _build(self, name: str, *arguments: str) -> Bundle:
        return self._run(name, "--guidance", "on", *arguments)

    def _run(self, name: str, *arguments: str) -> Bundle:
        out = self._folder / name
        command = [sys.executable, "-m", "fastvar.cli", "build", "--out", str(out), *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"`fastvar build` of {name} failed: {done.stderr[-2000:].strip()}")
        return Bundle.open(out)


def run_tests() -> Record:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    return {"ok": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:], "log": lines[-40:]}


def parity(builder: Builder, precision: str) -> Record:
    """Logits of every scale and the decoded image of the demo model, on equal bits, GPU against fp32 on the CPU."""
    demo = (str(ROOT / "demo" / "checkpoint"), "--size", "256x256")
    cpu, gpu = builder.cpu("demo-cpu", *demo), builder.gpu(f"demo-{precision}", *demo, "--precision", precision)
    features = random_features(cpu.manifest)
    found, expected = (EngineContender(bundle, features, GUIDED) for bundle in (gpu, cpu))
    pairs = zip(forced_logits(found), forced_logits(expected), strict=True)
    errors = [relative_error(*pair) for pair in pairs]
    image = relative_error(found.workspace.decode(), expected.workspace.decode())
    return {
        "ok": max(errors) <= TOLERANCES[precision],
        "logits_relative_error": errors,
        "image_relative_error": image,
        "tolerance": TOLERANCES[precision],
    }


def timing(builder: Builder, model: str, size: str, policy: str) -> Record:
    """Milliseconds per scale and peak memory of one size and policy; warm-up excluded."""
    name = f"{model}-{size}-{policy}"
    bundle = builder.gpu(name, "--random-weights", model, "--size", size, "--policy", policy)
    planned = device_need([build_layout(bundle.manifest, 2)])
    with sampler_for("cuda") as sampler:
        runs = timed_runs(bundle, cuda_graphs=True)
    memory = sampler.recording
    one_by_one = timed_runs(bundle, cuda_graphs=False)
    steps = bundle.manifest.plan.steps
    return {
        "ok": True,
        "runs": RUNS,
        "scales": [
            {"size": step.size, "tokens": step.tokens, "kept": step.kept, "ms": median(run.scale_ms[i] for run in runs)}
            for i, step in enumerate(steps)
        ],
        "scales_ms": median(run.scales_ms for run in runs),
        "scales_ms_without_cuda_graphs": median(run.scales_ms for run in one_by_one),
        "decode_ms": median(run.decode_ms or 0.0 for run in runs),
        "planned_bytes": vars(planned),
        "nvml_bytes": {"before": memory.device_before_bytes, "peak": memory.device_peak_bytes},
        "peak": vars(memory.peak),
    }


def timed_runs(bundle: Bundle, *, cuda_graphs: bool) -> list[Run]:
    """Images on a session of their own: the device has room for one."""
    contender = EngineContender(bundle, random_features(bundle.manifest), GUIDED, cuda_graphs=cuda_graphs)
    return [one_image(contender, abs(seed), decode=True) for seed in range(-WARM_UP, RUNS)][WARM_UP:]


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """L2 norm of the difference over that of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    typer.run(main)
