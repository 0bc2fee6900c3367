"""Backends by name. A backend's module is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import BackendError
from .base import Backend


def _onnxruntime(threads: int | None) -> Backend:
    from .onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(threads)


_BACKENDS: dict[str, Callable[[int | None], Backend]] = {"onnxruntime": _onnxruntime}
BACKEND_NAMES = tuple(_BACKENDS)


def get_backend(name: str, *, threads: int | None = None) -> Backend:
    """The backend of that name. `threads` is for those that run on the CPU; their own choice by default.

    Raises:
        BackendError: no backend of that name, or its library is not installed.
    """
    try:
        make = _BACKENDS[name]
    except KeyError:
        raise BackendError(
            f"no backend {name!r}", expected=f"one of {', '.join(BACKEND_NAMES)}", fix="check the spelling"
        ) from None
    return make(threads)
