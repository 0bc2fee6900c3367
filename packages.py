"""Optional packages, imported when they are asked for; one that is missing names the extra that brings it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from .errors import BackendError

# What importing a package raises that is missing, broken, or beside the wrong version of another; some look for a
# driver as soon as they are imported.
FAILURES = (ImportError, OSError, RuntimeError, AttributeError, ValueError)
_OURS = __name__.partition(".")[0]


def import_extra(module: str, extra: str, *, expected: str = "") -> Any:
    """A module of an optional package.

    Raises:
        BackendError: it is not installed, or does not load on this machine.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        raise _missing(module, extra, error, expected) from error


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """A block, or a decorated function, that imports packages of an extra, wherever in what it calls.

    Raises:
        BackendError: one of them is not installed, or does not load on this machine.
    """
    try:
        yield
    except FAILURES as error:
        package = _package_not_imported(error)
        if not package:
            raise
        raise _missing(package, extra, error) from error


def _missing(module: str, extra: str, error: Exception, expected: str = "") -> BackendError:
    return BackendError(
        f"{module} cannot be imported: {error}", expected=expected, fix=f'pip install "fastvar-runtime[{extra}]"'
    )


def _package_not_imported(error: Exception) -> str:
    """The package of others whose import an error stopped; empty where it is no import's error, or of our modules."""
    if isinstance(error, ImportError) and error.name:
        package = error.name.partition(".")[0]
        return "" if package == _OURS else package
    for name in _modules_under_way(error.__traceback__):
        if name != _OURS:
            return name
    return ""


def _modules_under_way(traceback: TracebackType | None) -> Iterator[str]:
    """Packages of the modules whose bodies ran when an exception was raised, the outermost first."""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "<module>":
            yield str(frame.f_globals.get("__name__", "")).partition(".")[0]
        traceback = traceback.tb_next
