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
import io
import lzma
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "export,onnxruntime,tensorrt-rtx,nvml,dev"
# By the name under which each is imported. Without the second kind some measurements are left out, and say so.
NEEDED = ("numpy", "safetensors", "tokenizers", "PIL", "msgspec", "typer", "rich", "torch", "onnx", "onnxruntime")
NEEDED += ("onnx_ir", "onnxscript", "transformers")
WANTED = ("pynvml", "cuda.bindings", "pytest", "filelock", "hypothesis", "jinja2")
PACKED = ("tensorrt_rtx*", "tensorrt_rtx_libs")
MOST_BYTES = 2 << 30  # of an unpacked archive: TensorRT-RTX takes a quarter of it
MOST_FILES = 20_000
HALVES = (".1", ".2")
DICTIONARY_BYTES = 256 << 20
MOST_MEMORY = 2 * DICTIONARY_BYTES  # for unpacking: the dictionary, and a little more
FILTERS = [
    {"id": lzma.FILTER_X86},
    {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "dict_size": DICTIONARY_BYTES,
        "lc": 4,
        "lp": 0,
        "pb": 0,
    },
]
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
    subprocess.run([str(python), str(Path(__file__)), *arguments], check=True)
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


def pack(packages: Path, out: Path) -> Path:
    """The TensorRT-RTX packages of an environment as one archive.

    The archive appears under its name only once it is whole.
    """
    folders = sorted({folder for pattern in PACKED for folder in packages.glob(pattern) if folder.is_dir()})
    if not folders:
        sys.exit(f"error: no TensorRT-RTX in {packages}\nfix: pip install 'fastvar-runtime[tensorrt-rtx]'")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tensorrt-rtx.tar.xz"
    partial = path.with_suffix(".partial")
    with lzma.open(partial, "wb", filters=FILTERS) as packed, tarfile.open(fileobj=packed, mode="w|") as archive:
        for folder in folders:
            archive.add(folder, folder.name, filter=_without_caches)
    os.replace(partial, path)
    return path


def halve(archive: Path) -> list[Path]:
    """An archive as two files in its place, for who carries less at a time than it takes."""
    content = archive.read_bytes()
    middle, parts = (len(content) + 1) // 2, []
    for half, piece in zip(HALVES, (content[:middle], content[middle:]), strict=True):
        parts.append(archive.with_name(archive.name + half))
        parts[-1].write_bytes(piece)
    archive.unlink()
    return parts


class _Joined(io.RawIOBase):
    """Files one behind the other, as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._left = iter(paths)
        self._file = next(self._left).open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not (count := self._file.readinto(buffer)):
            self._file.close()
            following = next(self._left, None)
            if following is None:
                self._left, self._file = iter(()), io.BytesIO()  # type: ignore[assignment]
                return 0
            self._file = following.open("rb")
        return count


def unpack(archive: Path, packages: Path, parts: Sequence[Path] = ()) -> None:
    """An archive made by `pack`, into an environment.

    Refused are members that lead outside of it or are no files, archives that unpack to more than TensorRT-RTX ever
    took, and those that want more memory for it than `pack` makes them want. What was unpacked before stays.
    """
    bytes_left, files_left = MOST_BYTES, MOST_FILES
    packed = lzma.LZMAFile(io.BufferedReader(_Joined(parts or [archive])))
    try:
        with packed, tarfile.open(fileobj=_Limited(packed, MOST_BYTES + (MOST_FILES << 10)), mode="r|") as members:
            for member in _checked(archive, members):
                bytes_left, files_left = bytes_left - member.size, files_left - 1
                if bytes_left < 0 or files_left < 0:
                    _refuse(archive, f"at most {MOST_BYTES} bytes in {MOST_FILES} files")
                target = packages / member.name
                if not target.resolve().is_relative_to(packages.resolve()):  # a link that lay there before
                    _refuse(archive, "files of one environment", member.name)
                members.extract(member, packages, filter="data") if _FILTERED else members.extract(member, packages)
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        sys.exit(f"error: {archive} is no whole archive: {error}")


_FILTERED = hasattr(tarfile, "data_filter")


def _checked(archive: Path, members: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in members:
        outside = member.name.startswith("/") or ".." in Path(member.name).parts
        if outside or not (member.isfile() or member.isdir()):
            _refuse(archive, "files of one environment", member.name)
        yield member


class _Limited:
    """A stream that ends the program when it gives more than it may: what a header says of sizes need not be true."""

    def __init__(self, stream: lzma.LZMAFile, limit: int) -> None:
        self._stream, self._left = stream, limit

    def read(self, size: int = -1) -> bytes:
        found = self._stream.read(size)
        self._left -= len(found)
        if self._left < 0:
            _refuse(Path("the archive"), f"at most {MOST_BYTES} bytes")
        return found


def _refuse(archive: Path, expected: str, member: str = "") -> None:
    held = f" holds {member!r}" if member else " holds more than it may"
    sys.exit(f"error: {archive}{held}\nexpected: {expected}")


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


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
