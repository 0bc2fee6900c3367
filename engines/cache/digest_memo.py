"""Digests of large files that were hashed before, so that hashing them costs once a machine.

A saving of time and nothing else. It trusts the file system: a file of the same path, size, time of change, inode and
device is taken to be the file that was hashed.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

import msgspec

from ...core.files import digest_of_file
from .engine_cache import default_folder, read_shared, save_shared

MEMO = "digests.json"
MOST_ENTRIES = 1024
# A file that was changed a moment ago may change again without its time moving on.
SETTLED_NS = 2_000_000_000

_log = logging.getLogger(__name__)


class _Seen(msgspec.Struct, frozen=True):
    """What a file looked like when it was hashed."""

    size: int
    mtime_ns: int
    inode: int
    device: int
    sha256: str


class DigestMemo:
    """Digests by the file's path, in the folder of kept engines unless another is given."""

    def __init__(self, folder: Path | None = None) -> None:
        self._path = (folder or default_folder()) / MEMO

    def digest(self, handle: BinaryIO, expected: str) -> str:
        """The sha256 of an open file, which is read only if this very file was not found to have the expected one."""
        before = _seen(handle, expected)
        if self._read().get(_name(handle)) == before:
            return expected
        found = digest_of_file(handle)
        if found == expected and _seen(handle, expected) == before:
            self._learn(_name(handle), before)
        return found

    def _learn(self, name: str, seen: _Seen) -> None:
        if time.time_ns() - seen.mtime_ns < SETTLED_NS:
            return
        known = self._read()
        known.pop(name, None)
        known[name] = seen
        save_shared(self._path, msgspec.json.encode(dict(list(known.items())[-MOST_ENTRIES:])))

    def _read(self) -> dict[str, _Seen]:
        text = read_shared(self._path)
        try:
            return msgspec.json.decode(text, type=dict[str, _Seen]) if text else {}
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            _log.warning("%s is damaged and will be made anew: %s", self._path, error)
            return {}


def _name(handle: BinaryIO) -> str:
    return str(Path(handle.name).resolve())


def _seen(handle: BinaryIO, sha256: str) -> _Seen:
    found = os.fstat(handle.fileno())
    return _Seen(found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev, sha256)
