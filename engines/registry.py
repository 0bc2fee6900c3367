"""Backends by name. A backend's module is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import BackendError
from .base import Backend


def _onnxruntime(threads: int | None, _cache_folder: Path | None) -> Backend:
    from .onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(threads)


def _tensorrt_rtx(_threads: int | None, cache_folder: Path | None) -> Backend:
    from .tensorrt import TensorRTRTXBackend

    return TensorRTRTXBackend(cache_folder)


def _tensorrt(_threads: int | None, cache_folder: Path | None) -> Backend:
    from .tensorrt import TensorRTDatacentreBackend

    return TensorRTDatacentreBackend(cache_folder)


_BACKENDS: dict[str, Callable[[int | None, Path | None], Backend]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt-rtx": _tensorrt_rtx,
    "tensorrt": _tensorrt,
}
BACKEND_NAMES = tuple(_BACKENDS)


def get_backend(name: str, *, threads: int | None = None, cache_folder: Path | None = None) -> Backend:
    """The backend of that name.

    Args:
        threads: for those that run on the CPU; their own choice by default.
        cache_folder: for those that compile on the GPU: where they keep it from run to run.

    Raises:
        BackendError: no backend of that name, or its library is not installed.
    """
    try:
        make = _BACKENDS[name]
    except KeyError:
        raise BackendError(
            f"no backend {name!r}", expected=f"one of {', '.join(BACKEND_NAMES)}", fix="check the spelling"
        ) from None
    return make(threads, cache_folder)
