"""`fastvar build` for who measures: in processes of their own, for what is timed shares its process with no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import BuildError
from fastvar.runtime.requests.settings import SamplingSettings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEMO = (str(ROOT / "demo" / "checkpoint"), "--size", "256x256")
GUIDED = SamplingSettings(guidance_scale=3.0, tau=1.0, top_p=0.97)


class Builder:
    """Runs `fastvar build`, and opens what it made."""

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
