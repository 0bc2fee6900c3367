"""Optional packages, imported when they are asked for; one that is missing names the extra that brings it."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import BackendError


def import_extra(module: str, extra: str, *, expected: str = "") -> Any:
    """A module of an optional package.

    Raises:
        BackendError: it is not installed, or does not load on this machine.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # some look for a driver as soon as they are imported
        raise BackendError(
            f"{module} cannot be imported: {error}",
            expected=expected,
            fix=f'pip install "fastvar-runtime[{extra}]"',
        ) from error
