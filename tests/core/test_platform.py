"""Packages that are missing or broken: whoever needs them is told which extra brings them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.core.platform import import_extra, needs_extra
from fastvar.errors import BackendError

EXTRA = 'pip install "fastvar-runtime[export]"'
# Runs commands one after another, so that what can be imported is imported once.
COMMANDS = """
import sys
for name in sys.argv[1].split(): sys.modules[name] = None
from fastvar.cli import main
for command in sys.argv[2:]:
    try:
        main(command.split("|"))
    except SystemExit as end:
        print("code", end.code, file=sys.stderr)
"""


def run(missing: str, *commands: str, **options: object) -> list[str]:
    """What each command told."""
    arguments = [sys.executable, "-c", COMMANDS, missing, *commands]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, **options)
    assert "Traceback" not in done.stderr
    told = done.stderr.split("code 2\n")
    assert len(told) == len(commands) + 1, done.stderr
    return told[:-1]


def with_broken(package: str, tmp_path: Path, body: str) -> dict[str, str]:
    """An environment in which a package does not load."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / f"{package}.py").write_text(body)
    path = os.pathsep.join([str(tmp_path / "broken"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def test_without_torch_every_command_names_the_extra(tiny_bundle: Path, tiny_checkpoint_folder: Path, tmp_path: Path):
    told = run(
        "torch",
        "plan|--model|infinity_2b",
        f"plan|{tiny_checkpoint_folder}",
        f"build|{tiny_checkpoint_folder}|--out|b",
        "build|--random-weights|infinity_layer12|--out|b",
        f"build|--from-bundle|{tiny_bundle}|--policy|dense|--out|b",
        cwd=tmp_path,
    )
    for said in told:
        assert said.startswith("error: torch cannot be imported")
        assert EXTRA in said
    assert os.listdir(tmp_path) == []


def test_a_bundle_is_planned_without_torch(tiny_bundle: Path):
    code = "import sys; sys.modules['torch'] = None; from fastvar.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(tiny_bundle)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("raise RuntimeError('no driver')", "no driver"),
        ("raise AttributeError(\"module 'numpy' has no attribute 'bool8'\")", "bool8"),
        ("raise ValueError('numpy.dtype size changed')", "dtype size changed"),
    ],
)
def test_a_broken_torch_is_told(tmp_path: Path, body: str, said: str):
    environment = with_broken("torch", tmp_path, body)
    (told,) = run("none", "plan|--model|infinity_2b", env=environment)
    assert "cannot be imported" in told
    assert said in told
    assert EXTRA in told


def test_tune_names_the_extra(tiny_bundle: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    environment = with_broken("torch", tmp_path, "raise ImportError('no torch here')")
    command = f"tune|{tiny_bundle}|--prompts|prompts.txt|--out|found"
    (told,) = run("none", command, env=environment, cwd=tmp_path)
    assert told.startswith("error: torch cannot be imported: no torch here")
    assert EXTRA in told
    assert list((tmp_path / "found").iterdir()) == []


def test_in_python_too(tmp_path: Path):
    code = (
        "import sys; sys.modules['torch'] = None\nimport fastvar\nfrom fastvar.errors import FastvarError\n"
        "try: fastvar.build('checkpoint', out='b')\nexcept FastvarError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("torch cannot be imported")
    assert EXTRA in done.stdout


@pytest.mark.slow  # torch itself is imported
@pytest.mark.parametrize("package", ["onnx", "onnxscript", "transformers", "safetensors.torch"])
def test_without_another_package_of_the_extra(
    tiny_bundle: Path, tiny_checkpoint_folder: Path, tmp_path: Path, package: str
):
    build = f"build|{tiny_checkpoint_folder}|--size|256x256|--no-cache|--out|b"
    commands = [build, f"plan|{tiny_checkpoint_folder}|--size|256x256"]
    for said in run(package, *commands, cwd=tmp_path):
        assert said.startswith(f"error: {package.partition('.')[0]} cannot be imported")
        assert EXTRA in said
    assert os.listdir(tmp_path) == []


def test_a_bug_of_ours_is_no_missing_package():
    with pytest.raises(ImportError), needs_extra("export"):
        from fastvar.core.schedule import no_such_name  # noqa: F401
    with pytest.raises(RuntimeError), needs_extra("export"):
        raise RuntimeError("while nothing is imported")
    with pytest.raises(ValueError, match="not ours"), needs_extra("export"):
        int("not ours")


def test_it_decorates_functions():
    @needs_extra("flash")
    def drawn() -> None:
        import no_such_package  # noqa: F401

    for _ in range(2):
        with pytest.raises(BackendError, match=r"no_such_package(.|\n)*fastvar-runtime\[flash\]"):
            drawn()


def test_import_extra():
    assert import_extra("json", "export").loads("1") == 1
    with pytest.raises(BackendError, match=r"no_such_package(.|\n)*expected: a GPU\nfix: .*\[nvml\]"):
        import_extra("no_such_package", "nvml", expected="a GPU")
