"""Backends by name. A backend's module is imported only when it is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BackendError

if TYPE_CHECKING:
    from .base import Backend
    from .bundle.manifest import Manifest

_BACKENDS = {  # name -> module, class
    "onnxruntime": ("onnxruntime.backend", "OnnxRuntimeBackend"),
    "tensorrt-rtx": ("tensorrt.backend", "TensorRTRTXBackend"),
    "tensorrt": ("tensorrt.backend", "TensorRTDatacentreBackend"),
    "aotinductor": ("aotinductor.backend", "AotInductorBackend"),
}
BACKEND_NAMES = tuple(_BACKENDS)
DEFAULT = "onnxruntime"  # of builds: runs everywhere
DEFAULT_OF_PLANS = "tensorrt-rtx"  # of plans, which are made for GPUs that are elsewhere


def backend_class(name: str) -> type[Backend]:
    """A backend's own facts, known without its library.

    Raises:
        BackendError: no backend of that name.
    """
    if name not in _BACKENDS:
        raise BackendError(
            f"no backend {name!r}", expected=f"one of {', '.join(BACKEND_NAMES)}", fix="check the spelling"
        )
    module, class_name = _BACKENDS[name]
    found: type[Backend] = getattr(importlib.import_module(f".{module}", __package__), class_name)
    return found


def runs_on_host(built: Manifest) -> bool:
    """Whether a bundle's engines run on the machine's own cores and in its memory.

    Raises:
        BackendError: no backend of that name.
    """
    return backend_class(built.backend).runs_on_host(built.target)


def get_backend(
    name: str, *, threads: int | None = None, cache_folder: Path | None = None, target: str | None = None
) -> Backend:
    """The backend of that name.

    Args:
        threads: for those that run on the CPU; their own choice by default.
        cache_folder: for those that compile on the GPU: where they keep it from run to run.
        target: for those that run on the CPU and on GPUs alike: which of them.

    Raises:
        BackendError: no backend of that name, or its library is not installed.
    """
    return backend_class(name).make(threads, cache_folder, target)
