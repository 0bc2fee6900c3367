"""Files written whole or not at all, in the modes that the user's umask gives, and brought to the disk where asked."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InputError

BLOCK_BYTES = 1 << 20  # read or written at a time
TEMPORARY = ".writing-"  # how names of half-written files begin
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_RENAME_SWAP = 2  # of macOS


@contextmanager
def whole_file(path: Path, *, sync: bool = False) -> Iterator[BinaryIO]:
    """A file to write: under a temporary name in the same folder, renamed when the block ends, removed when it fails.

    Args:
        sync: bring content and name to the disk before the block ends.

    Raises:
        OSError: it cannot be written; what was there under the name is as it was.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        with os.fdopen(_created(temporary), "wb") as handle:
            yield handle
            if sync:
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def write_whole(path: Path, data: bytes, *, sync: bool = False) -> None:
    """`whole_file` for bytes at hand."""
    with whole_file(path, sync=sync) as handle:
        handle.write(data)


def _created(path: Path) -> int:
    """A new file. The system applies the umask: it is never read, for that would change it for all threads."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.open(path, flags, 0o666)


def digest_of_file(handle: BinaryIO) -> str:
    """The sha256 of an open file from where it stands."""
    digest = hashlib.sha256()
    while block := handle.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def exchange(first: Path, second: Path) -> bool:
    """Let two files or folders of one file system trade places, in one step: at no moment is either name free.

    Returns:
        Whether they did. Not every system and file system can; then nothing was changed.
    """
    library: Any = ctypes.CDLL(None) if os.name == "posix" else None
    paths = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renamex_np"):
        return bool(library.renamex_np(*paths, _RENAME_SWAP) == 0)
    if hasattr(library, "renameat2"):
        return bool(library.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)
    return False


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    if os.name == "nt":  # folders cannot be opened there, and need not be
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
