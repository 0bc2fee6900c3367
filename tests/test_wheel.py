"""What users install: the wheel holds the whole package and nothing else, and draws where there is no torch.

Building and installing it takes packages from the package index.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvar
from fastvar import Pipeline
from tests.conftest import REPOSITORY, made_once
from tests.test_imports import modules

pytestmark = pytest.mark.slow

PROMPT = "a red circle"
TORCHLESS = """
import importlib.util, json
names = ("torch", "transformers", "onnx", "onnxscript", "fastvar", "onnxruntime")
print(json.dumps([name for name in names if importlib.util.find_spec(name)]))
"""


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A program that knows nothing of this repository and of this environment's packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def call(*command: object, cwd: Path) -> str:
    """Standard output of one that must succeed."""
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(python: str | Path, *arguments: object, cwd: Path) -> str:
    return call(python, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(shared: Path) -> Path:
    """Built from a copy: a build leaves folders in its source tree."""

    def build(folder: Path) -> None:
        ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "bundles", "checkpoint")
        source = shutil.copytree(REPOSITORY, folder / "source", ignore=ignored)
        pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
        shutil.rmtree(source)

    (found,) = made_once(shared / "wheel", build).glob("*.whl")
    return found


@pytest.fixture(scope="module")
def bare(shared: Path, wheel: Path) -> Path:
    """The programs of an environment that has the wheel, onnxruntime, and what they need."""

    def install(folder: Path) -> None:
        call(sys.executable, "-m", "venv", folder, cwd=folder.parent)
        pip(programs(folder) / "python", "install", "--quiet", f"{wheel}[onnxruntime]", cwd=folder)

    with_marker = shared / "bare"  # an environment cannot be moved: a file beside it says that it is complete
    made_once(shared / "bare.done", lambda done: (install(with_marker), done.touch()))
    return programs(with_marker)


def programs(environment: Path) -> Path:
    return environment / ("Scripts" if sys.platform == "win32" else "bin")


def read(wheel: Path, ending: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name).decode()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return Parser().parsestr(read(wheel, ".dist-info/METADATA"))


def test_it_holds_every_file_of_the_package_and_no_other(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    data = [REPOSITORY / "py.typed", *(REPOSITORY / "profiling" / "report").glob("report.*")]
    kernels = [*(REPOSITORY / "engines" / "aotinductor" / "kernels").iterdir()]
    assert len(data) == 3
    data.append(REPOSITORY / "serving" / "page" / "index.html")
    assert len(kernels) >= 2
    stand_in = [*(REPOSITORY / "engines" / "aotinductor" / "stand_in").iterdir()]
    files = (*modules(REPOSITORY).values(), *data, *kernels, *stand_in)
    expected = {f"fastvar/{file.relative_to(REPOSITORY).as_posix()}" for file in files}
    assert held == expected


def test_it_says_what_it_is(wheel: Path, metadata: Message):
    assert (metadata["Name"], metadata["Version"]) == ("fastvar-runtime", fastvar.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert read(wheel, ".dist-info/licenses/LICENSE") == (REPOSITORY / "LICENSE").read_text()
    assert metadata.get_payload() == (REPOSITORY / "README.md").read_text()
    assert metadata["Requires-Python"] == ">=3.10"
    classifiers = set(metadata.get_all("Classifier", []))
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)} <= classifiers
    assert {"Typing :: Typed", "Operating System :: OS Independent"} <= classifiers
    assert not [c for c in classifiers if c.startswith("License ::")], "the expression says it"
    assert {"export", "onnxruntime", "aotinductor", "tensorrt-rtx"} <= set(metadata.get_all("Provides-Extra", []))


def test_it_brings_the_command(wheel: Path):
    assert read(wheel, ".dist-info/entry_points.txt").split() == [
        "[console_scripts]",
        "fastvar",
        "=",
        "fastvar.__main__:main",
    ]


def test_it_draws_where_there_is_no_torch(bare: Path, tiny_bundle: Path, tmp_path: Path):
    assert json.loads(call(bare / "python", "-c", TORCHLESS, cwd=tmp_path)) == ["fastvar", "onnxruntime"]
    assert fastvar.__version__ in call(bare / "fastvar", "--version", cwd=tmp_path)
    facts = json.loads(call(bare / "fastvar", "inspect", tiny_bundle, "--json", cwd=tmp_path))
    assert facts["size"] == "256x256"
    call(bare / "fastvar", "generate", tiny_bundle, PROMPT, "--seed", 7, "--out", "images", cwd=tmp_path)
    (file,) = (tmp_path / "images").glob("*.png")
    drawn = np.asarray(Image.open(file).convert("RGB"), np.int16)
    here = np.asarray(Pipeline.load(tiny_bundle)(PROMPT, seed=7).images[0], np.int16)
    assert here.std() > 5
    # Another release of onnxruntime may round otherwise.
    assert np.abs(drawn - here).mean() < 0.5


@pytest.mark.parametrize(
    "arguments", [("build", "--random-weights", "infinity_2b", "--out", "bundle"), ("plan", "--model", "infinity_2b")]
)
def test_what_needs_the_exporter_tells_what_to_install(bare: Path, tmp_path: Path, arguments: tuple[str, ...]):
    done = run(bare / "fastvar", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "torch" in done.stderr
    assert "fastvar-runtime[export]" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_tuning_there_tells_it_too(bare: Path, tiny_bundle: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text(PROMPT)
    done = run(bare / "fastvar", "tune", tiny_bundle, "--prompts", "prompts.txt", "--out", "found", cwd=tmp_path)
    assert done.returncode == 2
    assert "fastvar-runtime[export]" in done.stderr
    assert "Traceback" not in done.stderr
