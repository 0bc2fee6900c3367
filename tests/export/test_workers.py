"""Workers are of the very package that started them, and say what they died of."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.core.precision import Precision
from fastvar.engines.spec import TensorSpec
from fastvar.errors import BuildError
from fastvar.export import workers
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.models.hart.steps import Pick
from fastvar.export.tasks import BuildTask
from fastvar.export.workers import Worker
from fastvar.families.hart import HartConfig

CONFIG = HartConfig(1, 8, 1, 8, 4, 8, 4, 4)
PICK = StepGraph("pick", Pick, {"config": CONFIG, "rows": 2, "size": (2, 2), "part": 3}, "")
TASK = BuildTask(PICK, {}, Precision(), "onnxruntime", "cpu")

PARENT = """
import os, sys
{before}
import fastvar
from fastvar.export.workers import Worker
from fastvar.export.tasks import BuildTask
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.models.hart.steps import Pick
from fastvar.families.hart import HartConfig
from fastvar.core.precision import Precision

config = HartConfig(1, 8, 1, 8, 4, 8, 4, 4)
pick = StepGraph("pick", Pick, dict(config=config, rows=2, size=(2, 2), part=3), "")
{after}
worker = Worker()
print(worker.run(BuildTask(pick, {{}}, Precision(), "onnxruntime", "cpu")).engine.outputs[0].shape)
worker.close()
print(fastvar.__file__)
"""
ROOT = Path(workers.__file__).parents[1]


@pytest.fixture
def decoy(tmp_path: Path) -> Path:
    """A folder with another package of our name."""
    package = tmp_path / "decoy" / "fastvar"
    (package / "export").mkdir(parents=True)
    for folder in (package, package / "export"):
        (folder / "__init__.py").write_text("__version__ = '9'\n")
    (package / "export" / "workers.py").write_text("def serve(): raise SystemExit('the other package')\n")
    return package.parent


def _run(code: str, folder: Path, path: str, *arguments: str, stdin: str | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, *arguments, *(["-c", code] if stdin is None else [])]
    done = subprocess.run(
        command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "where",
    ["found through the current folder", "moved to another package's folder", "another package first on the path"],
)
def test_a_worker_imports_its_parents_package(where: str, decoy: Path):
    before, after, folder, path = "assert sys.path[0] == ''", "", ROOT.parent, ""
    if where == "moved to another package's folder":
        before, after = f"sys.path.append({str(ROOT.parent)!r})", f"os.chdir({str(decoy)!r})"
        folder = decoy.parent
    if where == "another package first on the path":
        after = f"sys.path.insert(0, {str(decoy)!r})"
    found = _run(PARENT.format(before=before, after=after), folder, path)
    assert found.split("\n") == ["(6, 8)", str(ROOT / "__init__.py"), ""]


def test_so_it_does_where_the_parent_is_typed_in(decoy: Path):
    lines = PARENT.format(before=f"sys.path.insert(1, {str(ROOT.parent)!r})", after=f"os.chdir({str(decoy)!r})")
    found = _run("", decoy.parent, "", "-i", "-q", stdin=lines)
    assert found.split("\n") == ["(6, 8)", str(ROOT / "__init__.py"), ""]


def test_a_worker_runs_a_task_and_is_gone_when_closed():
    worker = Worker()
    assert worker.run(TASK).engine.outputs == (TensorSpec("x_out", "float32", (6, 8)),)
    worker.close()
    assert worker.process.poll() is not None


def test_a_worker_that_cannot_import_says_what(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "STATEMENT", "import fastvar.export.no_such_module")
    with pytest.raises(
        BuildError, match=r"died with code 1\n(.*\n)*.*No module named 'fastvar.export.no_such"
    ) as error:
        Worker().run(TASK)
    assert "memory" not in str(error.value)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
@pytest.mark.parametrize(("name", "memory"), [("SIGKILL", True), ("SIGSEGV", False), ("SIGTERM", False)])
def test_only_a_worker_that_was_killed_may_have_lacked_memory(monkeypatch: pytest.MonkeyPatch, name: str, memory: bool):
    killing = f"import os, signal, sys; sys.stdin.buffer.read(8); os.kill(os.getpid(), signal.{name})"
    greeting = "import fastvar.export.workers as w, sys; w._send(sys.stdout.buffer, w.identity()); "
    monkeypatch.setattr(workers, "STATEMENT", greeting + killing)
    with pytest.raises(BuildError, match=r"the worker that traced pick (was killed|died of signal \d+)") as error:
        Worker().run(TASK)
    assert ("may have run out of memory" in error.value.fix) == memory
    assert (name in str(error.value)) != memory


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("own['version'] = '9'", "version"),
        ("own['source'] = 'x'", "source"),
        ("own['folder'] = '/else'", "folder"),
        ("own.clear()", "version, folder, source"),
    ],
)
def test_a_worker_of_another_package_is_refused(monkeypatch: pytest.MonkeyPatch, change: str, named: str):
    statement = (
        f"import fastvar.export.workers as w, sys; own = w.identity(); {change}; w._send(sys.stdout.buffer, own)"
    )
    monkeypatch.setattr(workers, "STATEMENT", statement)
    with pytest.raises(BuildError, match=f"not of the fastvar that started it: {named} differ"):
        Worker().run(TASK)


def test_a_worker_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(BuildError, match="no process for a worker"):
        Worker()
