"""A GPU that is not there, so that programs for it are compiled on any Linux machine.

torch and Triton ask the CUDA runtime and driver for a device before they compile for it, and try kernels out on it.
The libraries of stand_in/ take the place of both in a process of its own: their device has the facts of gpus.py, memory
of the host, and kernels that are counted and not run. torch itself is unchanged. All kernels take the same time there,
so that a compiler that tries several takes the first: no build depends on a measurement.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...core.files import write_whole
from ...errors import BuildError
from ..cache.engine_cache import default_folder
from .gpus import GPUS

SOURCES = Path(__file__).parent / "stand_in"
LIBRARIES = {"libgpu.so": ("runtime.c", "blas.c"), "libcuda.so.1": ("driver.c",)}
FLAGS = ("-shared", "-fPIC", "-O1", "-fvisibility=hidden")
FACTS = "FASTVAR_STAND_IN_GPU"  # environment: the facts of the GPU
NONSENSE = f"{FACTS} is set: this GPU is not there and computes nothing, so images and timings are nonsense"
TOOLKIT = "install NVIDIA's CUDA toolkit (its compiler's package suffices), and set CUDA_HOME to its folder"


def environment(torch: Any, capability: str, folder: Path | None = None) -> dict[str, str]:
    """Variables of a process in which a GPU of that generation seems to be there.

    Args:
        folder: where the libraries are kept; beside the kept engines by default.

    Raises:
        BuildError: not on Linux, a torch without CUDA, or no C compiler or CUDA headers to make the libraries with.
    """
    if sys.platform != "linux":
        raise BuildError(
            f"a build for {capability} needs Linux where there is no such GPU", fix="build on Linux, or on that GPU"
        )
    if torch.version.cuda is None:
        raise BuildError(
            f"torch {torch.__version__} is a build for CPUs",
            expected="a CUDA build of torch to compile for GPUs with",
            fix="install one: pip install torch, from PyPI on Linux",
        )
    libraries = build(torch, folder)
    gpu, (major, minor) = GPUS[capability], (capability[2:-1], capability[-1])
    shared = f"{gpu.shared_block_bytes},{gpu.shared_processor_bytes},{gpu.l2_bytes}"
    return {
        FACTS: f"{major}.{minor},{gpu.processors},{gpu.threads},{shared},{gpu.name}",
        "LD_PRELOAD": _joined("LD_PRELOAD", libraries / "libgpu.so"),
        "LD_LIBRARY_PATH": _joined("LD_LIBRARY_PATH", libraries),
        "LIBRARY_PATH": _joined("LIBRARY_PATH", libraries),  # engines are linked against -lcuda
        "TRITON_LIBCUDA_PATH": str(libraries),
        "CUDA_VISIBLE_DEVICES": "0",
        "CUDA_HOME": str(_toolkit()),
    }


def is_stood_in() -> bool:
    """Whether this process sees a GPU that is not there."""
    return FACTS in os.environ


def build(torch: Any, folder: Path | None = None) -> Path:
    """Compile the libraries (1 s), or find them where that was done before.

    Returns:
        Their folder.

    Raises:
        BuildError: no C compiler, no CUDA headers, or the compiler rejects the source.
    """
    compiler, digest = _compiler(), hashlib.sha256(repr((FLAGS, LIBRARIES, torch.__version__)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    found = (folder or default_folder()) / f"stand-in-{digest.hexdigest()[:16]}"
    if all((found / name).is_file() for name in LIBRARIES):
        return found
    found.mkdir(parents=True, exist_ok=True)
    headers = [f"-I{path}" for path in _headers(torch)]
    with tempfile.TemporaryDirectory() as made:
        for name, sources in LIBRARIES.items():
            _run([compiler, *FLAGS, *headers, *(str(SOURCES / s) for s in sources), "-o", str(Path(made) / name)])
            write_whole(found / name, (Path(made) / name).read_bytes())
    link = found / "libcuda.so"
    if not link.exists():
        link.symlink_to("libcuda.so.1")
    return found


def _headers(torch: Any) -> list[Path]:
    """Folders of CUDA's headers: the toolkit's, and those of the packages that torch came with."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    return [_toolkit() / "include", *sorted(packages.glob("*/include"))]


def _toolkit() -> Path:
    compiler = shutil.which("nvcc")
    beside = [Path(os.path.realpath(compiler)).parents[1]] if compiler else []
    named = [Path(value) for name in ("CUDA_HOME", "CUDA_PATH") if (value := os.environ.get(name))]
    for folder in (*named, *beside, Path("/usr/local/cuda")):
        if (folder / "include" / "cuda_runtime_api.h").is_file():
            return folder
    raise BuildError("there are no CUDA headers to compile programs for GPUs with", fix=TOOLKIT)


def _compiler() -> str:
    found = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if found is None:
        raise BuildError("there is no C compiler", fix="install one, such as gcc")
    return found


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{' '.join(command)} failed: {error.stderr.strip()[:1000]}", fix=TOOLKIT) from error


def _joined(name: str, first: Path, variables: Mapping[str, str] = os.environ) -> str:
    """A list of paths with one before all that is there."""
    return ":".join(part for part in (str(first), variables.get(name, "")) if part)
