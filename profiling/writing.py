"""Result files: each is written under a temporary name and then renamed, so that no half file is ever seen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError


def write_json(path: Path, data: Any) -> Path:
    return write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file and the folders that contain it.

    Raises:
        InputError: it cannot be written.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def make_folder(path: Path) -> None:
    """Make a folder and those that contain it, unless they exist.

    Raises:
        InputError: it cannot be made.
    """
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", fix="check the path and its permissions") from error
