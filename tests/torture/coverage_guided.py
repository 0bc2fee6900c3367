"""Coverage-guided fuzzing of what reads text and headers: `python -m tests.torture.coverage_guided TARGET -runs=N`.

Needs atheris. What is refused in words is fine; any other exception ends the run with the input that caused it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNS = 20_000
TARGETS = ("weights", "manifest", "policy", "size", "bytes", "metadata")
REPOSITORY = Path(__file__).parents[2]


def coverage_campaign(seed: int, runs: int = RUNS) -> dict[str, Any]:
    """Every target in a process of its own, with its corpus of examples."""
    found: dict[str, Any] = {}
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", f"{__package__}.coverage_guided", target, f"-runs={runs}"]
            command += [f"-seed={seed}", f"-artifact_prefix={folder}/", "-timeout=20", "-max_len=4096"]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
            bad = int(done.returncode != 0)
            told = done.stderr.splitlines()[-40:] if bad else []
        found[target] = {"trials": runs, "seconds": round(time.perf_counter() - start, 1), "bad": bad, "failures": told}
    return found


def _targets() -> dict[str, tuple[Callable[[bytes], Any], list[bytes]]]:
    """What reads bytes, by name, with examples to start from; imported under instrumentation."""
    import atheris

    with atheris.instrument_imports(include=["fastvar"]):
        from fastvar.core.dtypes import parse_bytes
        from fastvar.core.schedule import parse_size
        from fastvar.engines.bundle import manifest
        from fastvar.engines.bundle.weight_file import WeightFile
        from fastvar.families import FAMILIES
        from fastvar.runtime.images.png import read_metadata, save_png

    from PIL import Image

    from tests.conftest import TINY_POLICY

    folder = Path(tempfile.mkdtemp())
    family = next(iter(FAMILIES.values()))
    schedule = next(iter(family.schedules(None).values()))

    def file_of(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
        def run(data: bytes) -> Any:
            (folder / name).write_bytes(data)
            return read(folder / name)

        return run

    def read_policy(path: Path) -> Any:
        policy = family.policy(str(path), schedule, 8)
        return [policy.rule(i).kept(100) for i in range(12)]

    def read_manifest(data: bytes) -> Any:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            return None
        return manifest.manifest_from_json(found) if isinstance(found, dict) else None

    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(24)
    save_png(Image.new("RGB", (2, 2)), folder / "example.png", {"prompt": "a red circle"})
    return {
        "weights": (file_of("w.safetensors", WeightFile), [weights]),
        "manifest": (read_manifest, [json.dumps({"format_version": manifest.FORMAT_VERSION}).encode()]),
        "policy": (file_of("policy.toml", read_policy), [TINY_POLICY.encode()]),
        "size": (lambda data: parse_size(data.decode("utf-8", "replace")), [b"1024x768", b"16:9"]),
        "bytes": (lambda data: parse_bytes(data.decode("utf-8", "replace")), [b"15GiB", b"1.5 MB"]),
        "metadata": (file_of("image.png", read_metadata), [(folder / "example.png").read_bytes()]),
    }


def main() -> None:
    import atheris

    read, examples = _targets()[sys.argv[1]]
    from fastvar.errors import FastvarError

    def one_input(data: bytes) -> None:
        with contextlib.suppress(FastvarError):
            read(data)

    with tempfile.TemporaryDirectory() as corpus:
        for number, example in enumerate(examples):
            (Path(corpus) / str(number)).write_bytes(example)
        atheris.Setup([sys.argv[0], *sys.argv[2:], corpus], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
