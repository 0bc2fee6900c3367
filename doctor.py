"""What this machine offers: packages by their metadata, CPU features, an NVIDIA driver. Imports none of them."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .core.platform import cpu_features, cpu_model, cpu_quota, memory_bytes, memory_limit_bytes, usable_cores
from .core.version import __version__
from .engines.cache.engine_cache import default_folder
from .engines.registry import BACKEND_NAMES, backend_class


@dataclass(frozen=True)
class Requirement:
    """What a use of fastvar needs: one of several packages each, and the extra that brings them."""

    use: str
    extra: str
    packages: tuple[tuple[str, ...], ...]
    note: str


BASE = ("numpy", "safetensors", "tokenizers", "pillow", "msgspec", "typer", "rich")  # installed with fastvar itself
OPTIONAL = ("torch-tensorrt", "flash-attn", "nvidia-ml-py", "cryptography")  # used where they are there


def _each(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


def _of_backend(name: str) -> Requirement:
    backend = backend_class(name)
    return Requirement(f"backend {name}", backend.extra, backend.distributions, backend.summary)


REQUIREMENTS = (
    Requirement(
        "fastvar build",
        "export",
        _each("torch", "onnx", "onnx-ir", "onnxscript", "transformers"),
        "on any machine, without a GPU",
    ),
    Requirement("fastvar profile", "profile", _each("jinja2"), "writes a report as one HTML page"),
    *(_of_backend(name) for name in BACKEND_NAMES),
)


def examine() -> dict[str, Any]:
    """All facts, ready for json.dumps."""
    needed = (name for requirement in REQUIREMENTS for names in requirement.packages for name in names)
    packages = {name: _version(name) for name in (*BASE, *needed, *OPTIONAL)}
    folder = default_folder()
    return {
        "fastvar": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_cores": usable_cores(),
        "cpu_quota": cpu_quota(),
        "cpu_features": cpu_features(),
        "memory_bytes": memory_bytes(),
        "memory_limit_bytes": memory_limit_bytes(),
        "cxx": shutil.which(os.environ.get("CXX", "g++")),
        "nvidia_driver": _nvidia_driver(),
        "packages": packages,
        "uses": [_judge(requirement, packages) for requirement in REQUIREMENTS],
        "cache": {"folder": str(folder), **_folder_use(folder)},
    }


def _judge(requirement: Requirement, packages: dict[str, str | None]) -> dict[str, Any]:
    missing = [" or ".join(names) for names in requirement.packages if not any(packages[name] for name in names)]
    fix = f"pip install 'fastvar-runtime[{requirement.extra}]'" if missing else ""
    return {"use": requirement.use, "ready": not missing, "missing": missing, "fix": fix, "note": requirement.note}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_driver() -> str | None:
    """Version of the kernel driver; "unknown" where only its tool is there."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown" if shutil.which("nvidia-smi") else None
    found = re.search(r"Kernel Module\D*([\d.]+)", text)
    return found[1] if found else "unknown"


def _folder_use(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {"files": 0, "bytes": 0}
    sizes = [entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()]
    return {"files": len(sizes), "bytes": sum(sizes)}
