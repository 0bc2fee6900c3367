"""The runtime needs no torch, and `import fastvar` costs next to nothing. Child processes: this one has torch."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastvar import Pipeline
from tests.conftest import REPOSITORY

BLOCK = """
import importlib.abc, json, sys, time

BLOCKED = {"torch", "transformers", "onnx", "onnxscript", "onnx_ir"}
asked = []


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in BLOCKED:
            asked.append(name)
            raise ImportError(f"{name} is blocked")
        return None


sys.meta_path.insert(0, Blocker())
"""

GENERATE = """
import hashlib

from fastvar import Pipeline

pipe = Pipeline.load(sys.argv[1], verify="all")
previews = [event.preview() for event in pipe.stream("a red circle", seed=3, guidance_scale=2.0)]
out = pipe("a red circle", seed=3, negative_prompt="a blue square")
one_row = pipe("a red circle", seed=3, guidance_scale=1)
images = [*out.images, *one_row.images]
print(json.dumps({
    "images": [hashlib.sha256(image.tobytes()).hexdigest() for image in images],
    "asked": asked,
    "loaded": sorted(BLOCKED & sys.modules.keys()),
}))
"""

IMPORT = """
start = time.perf_counter()
import fastvar

seconds = time.perf_counter() - start
heavy = {"torch", "transformers", "onnx", "onnxruntime", "numpy", "PIL", "tokenizers", "safetensors", "typer", "rich"}
print(json.dumps({"seconds": seconds, "heavy": sorted(heavy & sys.modules.keys()), "version": fastvar.__version__}))
"""


def run(code: str, *arguments: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=REPOSITORY, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_generation_with_torch_blocked_equals_one_beside_torch(tiny_bundle: Path):
    found = run(BLOCK + GENERATE, str(tiny_bundle))
    assert found["asked"] == [], "the runtime does not even try"
    assert found["loaded"] == []
    pipe = Pipeline.load(tiny_bundle)
    here = pipe("a red circle", seed=3, negative_prompt="a blue square").images
    here += pipe("a red circle", seed=3, guidance_scale=1).images
    assert found["images"] == [hashlib.sha256(image.tobytes()).hexdigest() for image in here]


def test_the_block_works():
    attempt = "try:\n    import fastvar.export.build\nexcept ImportError as error:\n    print(json.dumps(str(error)))"
    assert run(BLOCK + attempt) == "torch is blocked"


def test_command_line_starts_without_torch(tiny_bundle: Path):
    code = BLOCK + (
        "\nimport io, contextlib\nfrom fastvar.cli import app\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(app, ['inspect', sys.argv[1], '--json'])\n"
        "print(json.dumps([result.exit_code, asked]))"
    )
    assert run(code, str(tiny_bundle)) == [0, []]


LACKING = """
import json, sys

sys.modules["torch"] = None  # importing it fails
from fastvar.errors import FastvarError

try:
    from fastvar import build
    build("checkpoint", out="bundle")
except FastvarError as error:
    print(json.dumps([error.problem, error.fix]))
"""


def test_the_exporter_without_its_packages_tells_what_to_install():
    problem, fix = run(LACKING)
    assert problem.startswith("torch cannot be imported")
    assert fix == 'pip install "fastvar-runtime[export]"'


def test_import_is_fast_and_light():
    runs = [run("import json, sys, time\n" + IMPORT) for _ in range(5)]
    assert min(r["seconds"] for r in runs) < 0.3
    assert runs[0]["heavy"] == []
