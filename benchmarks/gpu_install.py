"""What `make gpu` needs, installed with or without a network; standard library only, run before anything is there.

A folder for a machine without one holds wheels (*.whl) and packed libraries (*.tar.xz, made by --pack: a wheel's own
compression leaves TensorRT-RTX at 150 MiB and more, xz with a dictionary larger than its kernels at about 60).
"""

from __future__ import annotations

import argparse
import lzma
import os
import site
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "export,onnxruntime,tensorrt-rtx,nvml,dev"
PACKED = ("tensorrt_rtx*", "tensorrt_rtx_libs")
DICTIONARY_BYTES = 256 << 20
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


def install(wheels: Path | None, packages: Path) -> None:
    """Into the running environment: from the folder alone, or from the network."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if wheels is None:
        subprocess.run([*pip, "--editable", f"{ROOT}[{EXTRAS}]"], check=True)
        return
    if not wheels.is_dir():
        sys.exit(f"error: no folder {wheels}\nexpected: a folder with *.whl and *.tar.xz files")
    files = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    if files:
        subprocess.run([*pip, "--no-index", "--no-deps", *files], check=True)
    for archive in sorted(wheels.glob("*.tar.xz")):
        unpack(archive, packages)
    link(packages)


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


def unpack(archive: Path, packages: Path) -> None:
    """An archive made by `pack`, into an environment; refuses members that lead outside of it."""
    with lzma.open(archive) as packed, tarfile.open(fileobj=packed, mode="r|") as members:
        for member in members:
            if (
                member.name.startswith("/")
                or ".." in Path(member.name).parts
                or not (member.isfile() or member.isdir())
            ):
                sys.exit(f"error: {archive} holds {member.name!r}\nexpected: files of one environment")
            members.extract(member, packages)


def _without_caches(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name else member


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, help="install from this folder, without a network")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="pack this environment's TensorRT-RTX instead")
    arguments = parser.parse_args()
    packages = Path(site.getsitepackages()[0])
    if arguments.pack:
        path = pack(packages, arguments.pack)
        print(f"wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)")
        return
    install(arguments.wheels, packages)


if __name__ == "__main__":
    main()
