"""One writer per folder: an advisory lock on `<folder>.lock`, which dies with its process."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import BinaryIO

from ...errors import BundleError

if sys.platform != "win32":
    import fcntl


# What file systems without locks answer: some network and cluster ones, and some of containers.
_NO_LOCKS = {getattr(errno, name, None) for name in ("ENOLCK", "EOPNOTSUPP", "ENOTSUP", "ENOSYS", "EINVAL")}


class FolderLock:
    """Held from `acquire` to `release`. A lock file left by a killed process locks nothing.

    Windows has no `flock`: there two builds into one folder are not kept apart.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder.with_name(folder.name + ".lock")
        self._handle: BinaryIO | None = None

    def acquire(self, wait: bool = False) -> None:
        """Take the lock; where another process holds it, fail at once, or wait for it.

        Raises:
            BundleError: another process holds it, the file system has no locks, or the lock file cannot be made.
        """
        while self._handle is None:
            try:
                handle = self._path.open("ab+")
            except OSError as error:
                raise BundleError(
                    f"cannot write {self._path}: {error.strerror}", fix="check the free space and the permissions"
                ) from error
            try:
                self._lock(handle, wait)
                if self._is_current(handle):
                    self._handle = handle
            finally:
                if self._handle is None:
                    handle.close()

    def release(self) -> None:
        if self._handle is None:
            return
        if sys.platform != "win32":  # an open file cannot be removed there
            self._path.unlink(missing_ok=True)
        self._handle.close()
        self._handle = None

    def _lock(self, handle: BinaryIO, wait: bool) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BundleError(
                f"another build into {self._folder} is running",
                expected="one build at a time into a folder",
                fix="wait for it, or choose another folder",
            ) from None
        except OSError as error:
            raise BundleError(
                f"{self._path} cannot be locked: {error.strerror}",
                expected="a file system that locks files" if error.errno in _NO_LOCKS else "a lock that nobody holds",
                fix="choose a folder on a local disk, and copy or move the result" if error.errno in _NO_LOCKS else "",
            ) from error

    def _is_current(self, handle: BinaryIO) -> bool:
        """Whether the file is still the one under that name: its last holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(handle.fileno()), self._path.stat())
        except FileNotFoundError:
            return False
