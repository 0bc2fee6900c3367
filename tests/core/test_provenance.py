"""Which source a module is made of, and that the keys of kept graphs and engines go by it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.core import provenance
from fastvar.core.provenance import modules_behind, source_digest
from fastvar.engines.aotinductor.native import HEADERS, KERNELS, SOURCES
from fastvar.errors import InternalError

PARTS = ("commands", "console", "core", "engines", "export", "families", "profiling", "runtime")
# Each is a kind of step graph of one family, the text encoders and image coders among them.
STEPS = ("infinity.steps", "var.steps", "hart.steps", "common.coders", "common.qwen2_encoder", "common.decoder_stages")

# Which modules an edit of each changes: keys of graphs, of engines, and of programs. Edits change no import.
KEYS = """
import json, sys
from fastvar.core import provenance
from fastvar.errors import InternalError
from fastvar.engines.registry import backend_class
from fastvar.export import tasks
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.core.precision import Precision

def keys():
    provenance.source_digest.cache_clear()
    found, onnx_task = {}, None
    for kind in reversed(sys.argv[2:]):
        module = __import__(f"fastvar.export.models.{kind}", fromlist=["x"])
        step = next(v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__)
        for via in ("onnx", "program"):
            task = tasks.BuildTask(StepGraph("g", step, {}, ""), {}, Precision(), "any", "cpu", via)
            found[f"{kind} {via}"] = task.graph_key
            onnx_task = task if via == "onnx" else onnx_task
    for backend in ("onnxruntime", "tensorrt", "aotinductor"):
        cls = backend_class(backend)
        made = object.__new__(cls)
        made._on_host, made._target = True, "cpu"
        cls.version = lambda self: "1"
        found[backend] = onnx_task.engine_key(made.stamp())
    return found

root, before, changed = provenance.ROOT, keys(), {}
assert str(root) == sys.argv[1], root
for path in sorted([*root.rglob("*.py"), *root.rglob("*.cpp"), *root.rglob("*.h")]):
    source = path.read_bytes()
    path.write_bytes(source + (b"\\n// edited\\n" if path.suffix != ".py" else b"\\n# edited\\n"))
    now = keys()
    path.write_bytes(source)
    changed[path.relative_to(root).as_posix()] = [name for name in before if now[name] != before[name]]
assert keys() == before
print(json.dumps(changed))
"""

IMPORTED = """
import sys
import fastvar.export.tasks, fastvar.export.tracing.onnx
import importlib
importlib.import_module("fastvar.export.models." + sys.argv[1])
print(*sorted(name for name in sys.modules if name.partition(".")[0] == "fastvar"))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Of a copy of the package: file -> the keys that an edit of it changes."""
    folder = tmp_path_factory.mktemp("copy")
    root = (folder / "fastvar").resolve()
    for part in PARTS:
        shutil.copytree(provenance.ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    for path in provenance.ROOT.glob("*.py"):
        shutil.copy(path, root)
    return {file: set(keys) for file, keys in json.loads(_python(KEYS, str(root), *STEPS, path=folder)).items()}


def _python(code: str, *arguments: str, path: Path = provenance.ROOT.parent) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _file(module: str) -> str:
    path = provenance._file_of(module)
    assert path is not None
    return path.relative_to(provenance.ROOT).as_posix()


def test_every_module_behind_a_graph_changes_its_key_and_no_other_does(changed: dict[str, set[str]]):
    for kind in STEPS:
        steps = f"fastvar.export.models.{kind}"
        for via, tracer in (("onnx", "onnx"), ("program", "torch_export")):
            behind = modules_behind(steps, "fastvar.export.tasks", f"fastvar.export.tracing.{tracer}")
            assert {_file(module) for module in behind} == {f for f, keys in changed.items() if f"{kind} {via}" in keys}


NOUNS = ("core/resize", "core/schedule", "core/precision", "core/plan", "families/var", "families/base", "__init__")
COMMON = ("rows", "step_graph", "quantise", "weights")
MAKERS = ("export/tracing/onnx", "export/models/transformer/block_steps", "core/dtypes", "core/rotary")


@pytest.mark.parametrize("file", [*NOUNS, *MAKERS, *(f"export/models/common/{name}" for name in COMMON)])
def test_nouns_that_graphs_are_made_with_change_every_graph_of_infinity(changed: dict[str, set[str]], file: str):
    assert {"infinity.steps onnx", "infinity.steps program", "onnxruntime"} <= changed[f"{file}.py"]


def test_what_only_draws_measures_or_asks_changes_nothing(changed: dict[str, set[str]]):
    for file, keys in changed.items():
        if file.startswith(("runtime/", "profiling/", "commands/", "console/", "cli", "doctor", "engines/bundle")):
            assert keys == set(), file
    for file in ("checkpoints/checkpoint", "checkpoints/text_encoders", "build", "construction", "factory", "workers"):
        assert changed[f"export/{file}.py"] == set()


def test_what_a_backend_does_to_graphs_changes_its_own_engines_alone(changed: dict[str, set[str]]):
    for file in ("rewriting", "attention", "convolutions", "norms", "editor", "estimates", "backend"):
        assert changed[f"engines/onnxruntime/{file}.py"] == {"onnxruntime"}, file
    for file in ("passes.py", "convolutions.py", "targets.py", "backend.py"):
        assert changed[f"engines/aotinductor/{file}"] == {"aotinductor"}, file
    assert {*SOURCES, *HEADERS} == {path.name for path in KERNELS.iterdir()}
    for file in (*SOURCES, *HEADERS):
        assert changed[f"engines/aotinductor/kernels/{file}"] == {"aotinductor"}, file
    assert changed["engines/tensorrt/backend.py"] == {"tensorrt"}
    assert changed["engines/onnx_graph.py"] == {"onnxruntime", "tensorrt"}


@pytest.mark.parametrize("kind", ["infinity.steps", "hart.steps", "common.qwen2_encoder"])
def test_what_is_behind_a_module_is_what_a_fresh_process_imports_with_it(kind: str):
    behind = modules_behind("fastvar.export.tasks", "fastvar.export.tracing.onnx", f"fastvar.export.models.{kind}")
    assert _python(IMPORTED, kind).split() == list(behind)


def test_imports_in_functions_are_only_those_that_choose():
    """What is behind a graph would lack others."""
    import ast

    found = set()
    for module in modules_behind(
        "fastvar.export.tasks", "fastvar.export.tracing.torch_export", "fastvar.export.models.registry"
    ):
        path = provenance._file_of(module)
        assert path is not None
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("fastvar")):
                    found.add(module)
    # A backend's engines go by its own source, a way's by that of its module; the face chooses nothing of a graph.
    assert found == {"fastvar", "fastvar.export.tasks"}


def test_digest_is_the_same_in_every_process_and_folder(tmp_path: Path):
    names = ("fastvar.export.models.infinity.steps", "fastvar.export.tracing.onnx")
    code = "import sys; from fastvar.core.provenance import source_digest; print(source_digest(*sys.argv[1:]))"
    loaded = "import fastvar.runtime.pipeline, fastvar.export.checkpoints.checkpoint; " + code
    assert _python(code, *names).strip() == _python(loaded, *names).strip() == source_digest(*names)


def test_a_module_from_outside_counts_with_its_own_source_and_what_it_imports(tmp_path: Path, monkeypatch):
    file = tmp_path / "own_steps.py"
    file.write_text("from fastvar.export.models.common.rows import first\nimport numpy\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_steps

    assert own_steps.first is not None
    assert {"own_steps", "fastvar.export.models.common.rows", "fastvar.core.resize"} <= set(modules_behind("own_steps"))
    before = source_digest("own_steps")
    file.write_text(file.read_text() + "# edited\n")
    source_digest.cache_clear()
    assert source_digest("own_steps") != before


def test_a_module_that_is_not_there_is_a_bug_and_no_digest():
    with pytest.raises(InternalError, match=r"no source of fastvar\.export\.atlas"):
        source_digest("fastvar.export.atlas")
