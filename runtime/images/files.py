"""Image files on the disk: whole or not at all, and never over a file that is there.

A file is written under a temporary name, `.fastvar-` and 16 hexadecimal digits, in its own folder, brought to the disk,
and then given its name. Errors and signals leave no such file; a process that was killed may, and it can be removed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from ...errors import InputError
from .file_names import numbered
from .formats import format_of

TEMPORARY = ".fastvar-"  # temporary files start so


def save_image(image: Image.Image, path: Path, metadata: Mapping[str, str], quality: int | None = None) -> Path:
    """Write an image with its metadata, in the format that the suffix names. Makes the folder if need be.

    Returns:
        Where it is: `path`, or with -2, -3 and so on before the suffix where that was taken.

    Raises:
        InputError: it cannot be written there, or not in that format.
    """
    with _writing(path):
        data = format_of(path).encode(image, metadata, quality)
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_new(path, data)


def write_new(path: Path, data: bytes) -> Path:
    """Write a new file, whole, under the first of the numbered names that is free when it is given.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, 0o666), "wb") as file:  # less the umask: readable as any new file is
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        taken = next(candidate for candidate in numbered(path) if _take(temporary, candidate))
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _sync_folder(path.parent)
    return taken


def check_writable(folder: Path) -> None:
    """Try, with a temporary file, whether files can be written there; a folder yet to be made is tried in its parent.

    Raises:
        InputError: nothing can be written there.
    """
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    with _writing(folder), tempfile.TemporaryFile(dir=existing, prefix=TEMPORARY):
        pass


def _take(temporary: Path, name: Path) -> bool:
    """Give a file its name unless that is taken: of several processes that try, one succeeds."""
    try:
        os.link(temporary, name)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        return _take_by_placeholder(temporary, name)
    return True


def _take_by_placeholder(temporary: Path, name: Path) -> bool:
    """The same where files cannot have two names: an empty file takes the name, and is replaced."""
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    try:
        os.replace(temporary, name)
    except BaseException:
        if os.path.lexists(temporary):  # so the placeholder is still one
            name.unlink(missing_ok=True)
        raise
    return True


def _sync_folder(folder: Path) -> None:
    """Bring the name to the disk too, where folders can be opened for that; the image is written either way."""
    if os.name == "nt":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}", fix="choose another place with --out, or free some space"
        ) from error
