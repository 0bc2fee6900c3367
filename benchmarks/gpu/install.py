"""What `make gpu` needs, with or without a network; standard library only, run before anything is there.

A Python that has a CUDA build of torch, or that is an environment already, is used as it is: beside it comes a folder
with a link to this repository and with the wheels that it lacks. Any other gets an environment of its own.

A folder for a machine without a network holds wheels (*.whl) and packed libraries (*.tar.xz, made by --pack: a wheel's
own compression leaves TensorRT-RTX at 150 MiB and more, xz with a dictionary larger than its kernels at about 60).
An archive in halves (*.tar.xz.1, *.tar.xz.2) is put together when both are there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.gpu.archives import HALVES, halve, pack, unpack

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = "export,onnxruntime,tensorrt-rtx,nvml,dev"
# By the name under which each is imported. Without the second kind some measurements are left out, and say so.
NEEDED: tuple[str, ...] = (
    "numpy",
    "safetensors",
    "tokenizers",
    "PIL",
    "msgspec",
    "typer",
    "rich",
    "torch",
    "onnx",
    "onnxruntime",
)
NEEDED += ("onnx_ir", "onnxscript", "transformers")
WANTED = ("pynvml", "cuda.bindings", "pytest", "filelock", "hypothesis", "jinja2")
# Where drivers put their library, beside the folders that the loader knows.
DRIVER_FOLDERS = ("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib64")


def python_at_hand() -> bool:
    """Whether this Python is used as it is: it is an environment, or torch with CUDA is there."""
    return sys.prefix != sys.base_prefix or has_cuda_torch()


def has_cuda_torch() -> bool:
    """Whether torch is here and built for CUDA. It is asked, not imported: that takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    version = Path(found.origin).with_name("version.py")
    return version.is_file() and re.search(r"^cuda\b.*=\s*['\"]\d", version.read_text(), re.MULTILINE) is not None


def prepare(folder: Path, wheels: Path | None, venv: Path) -> Path:
    """Make a program `python` in the folder that runs what was prepared; gives it."""
    packages, launcher = folder / "site", folder / "python"
    packages.mkdir(parents=True, exist_ok=True)
    if python_at_hand():
        beside(packages, wheels)
        write_launcher(launcher, Path(sys.executable), packages, folder / "lib")
        return launcher
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(venv)], check=True)
    arguments = ["--install", *(["--wheels", str(wheels)] if wheels else [])]
    subprocess.run([str(python), "-m", "benchmarks.gpu.install", *arguments], check=True, cwd=ROOT)
    link(packages)
    write_launcher(launcher, python, packages, folder / "lib")
    return launcher


def beside(packages: Path, wheels: Path | None) -> None:
    """Nothing of the Python at hand is changed: the link, and what it lacks, come into a folder of their own."""
    link(packages)
    if wheels is not None:
        unpack_all(wheels, packages, lacking(_wheels_in(wheels)))
    missing = [name for name in NEEDED if not _is_there(name, packages)]
    if missing:
        sys.exit(
            f"error: {sys.executable} lacks {', '.join(missing)}\nfix: install them there, or give WHEELS=FOLDER, "
            "a folder of their wheels"
        )
    for name in WANTED:
        if not _is_there(name, packages):
            print(f"{name} is not there: what needs it is left out", file=sys.stderr)


def lacking(wheels: Sequence[Path]) -> list[Path]:
    """Wheels of distributions that are not installed in any version."""
    return [wheel for wheel in wheels if not _installed(wheel.name.split("-")[0].replace("_", "-"))]


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_there(module: str, packages: Path) -> bool:
    top = module.split(".")[0]
    if any((packages / name).exists() for name in (top, f"{top}.py")):
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in is missing
        return False


def write_launcher(path: Path, python: Path, packages: Path, lib: Path) -> None:
    """A program that runs a Python with the folder of packages before its own, and a driver that linkers find."""
    variables = {"PYTHONPATH": f"{packages}${{PYTHONPATH:+:$PYTHONPATH}}"}
    lines = [f'export {name}="{value}"' for name, value in variables.items()]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in linker_variables(lib).items()]
    path.write_text("\n".join(("#!/bin/sh", *lines, f'exec {shlex.quote(str(python))} "$@"', "")))
    path.chmod(0o755)


def linker_variables(folder: Path, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables under which a linker finds -lcuda: drivers bring libcuda.so.1 alone, and toolkits not always a stub."""
    known = [Path(part) for part in variables.get("LIBRARY_PATH", "").split(":") if part]
    if any((path / "libcuda.so").exists() for path in known) or _linker_finds("libcuda.so"):
        return {}
    library = driver_library(variables)
    if library is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "libcuda.so"
    target.unlink(missing_ok=True)
    target.symlink_to(library)
    return {"LIBRARY_PATH": ":".join(map(str, (folder, *known)))}


def driver_library(variables: Mapping[str, str] = os.environ) -> Path | None:
    """The driver's libcuda.so.1."""
    named = [part for part in variables.get("LD_LIBRARY_PATH", "").split(":") if part]
    for folder in (*named, *DRIVER_FOLDERS):
        if (Path(folder) / "libcuda.so.1").exists():
            return Path(folder) / "libcuda.so.1"
    loader = shutil.which("ldconfig") or "/sbin/ldconfig"
    try:
        listed = subprocess.run([loader, "-p"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    found = re.search(r"libcuda\.so\.1 .*=> (\S+)", listed)
    return Path(found[1]) if found else None


def _linker_finds(library: str) -> bool:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return False
    said = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=False).stdout
    return "/" in said


def install(wheels: Path | None, packages: Path) -> None:
    """Into the running environment: from the folder alone, or from the network."""
    if wheels is None:
        subprocess.run([*_pip(), "--editable", f"{ROOT}[{EXTRAS}]"], check=True)
        return
    files = _wheels_in(wheels)
    if files:
        subprocess.run([*_pip(), "--no-index", "--no-deps", *map(str, files)], check=True)
    unpack_all(wheels, packages)
    link(packages)


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def _wheels_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        sys.exit(f"error: no folder {folder}\nexpected: a folder with *.whl and *.tar.xz files")
    return sorted(folder.glob("*.whl"))


def unpack_all(folder: Path, packages: Path, wheels: Sequence[Path] = ()) -> None:
    """Wheels and archives of a folder, into one that Python looks for packages in."""
    if wheels:
        target = ["--target", str(packages), "--upgrade", "--no-index", "--no-deps"]
        subprocess.run([*_pip(), *target, *map(str, wheels)], check=True)
    for archive in sorted(folder.glob("*.tar.xz")):
        unpack(archive, packages)
    for first in sorted(folder.glob(f"*.tar.xz{HALVES[0]}")):
        parts = [first.with_suffix(half) for half in HALVES]
        if all(part.is_file() for part in parts):
            unpack(first.with_suffix(""), packages, parts)
        else:
            print(f"{first.with_suffix('')}: one half is missing, so it is left out", file=sys.stderr)


def link(packages: Path) -> None:
    """The repository is the package `fastvar`: a link under that name is all it takes to be installed."""
    target = packages / "fastvar"
    if target.is_symlink():
        target.unlink()
    target.symlink_to(ROOT, target_is_directory=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, help="install from this folder, without a network")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="make FOLDER/python, ready for benchmarks.gpu")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-gpu", help="the environment, if one must be made")
    parser.add_argument("--install", action="store_true", help="install into the running environment")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="pack this environment's TensorRT-RTX instead")
    parser.add_argument("--halves", action="store_true", help="with --pack: in two files")
    arguments = parser.parse_args()
    packages = Path(site.getsitepackages()[0])
    if arguments.pack:
        path = pack(packages, arguments.pack)
        for part in halve(path) if arguments.halves else [path]:
            print(f"wrote {part} ({part.stat().st_size / 2**20:.1f} MiB)")
    elif arguments.prepare:
        print(prepare(arguments.prepare.resolve(), arguments.wheels, arguments.venv))
    else:
        install(arguments.wheels, packages)


if __name__ == "__main__":
    main()
