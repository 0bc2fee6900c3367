"""Files of a bundle that is read: inside its folder, of the right size, and of the right digest.

Digests find damage. Who can change a file can change the manifest with it: against that only a signature helps.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ...core.files import digest_of_file
from ...errors import BundleError
from ..cache.digest_memo import DigestMemo
from .folder import MANIFEST, MOST_MANIFEST_BYTES, SIGNATURE, is_inside, siblings
from .manifest import FileRecord
from .signature import SIGNATURE_BYTES

Stamp = tuple[int, int, int, int]  # which manifest lies under a path, as the file system knows it
REBUILD = "copy the bundle again, or rebuild it with `fastvar build`"


class BeingReplaced(Exception):  # noqa: N818 caught by who opens a bundle
    """The bundle under a path is another one than a moment ago."""


def hub_model(folder: Path) -> Path | None:
    """The folder of the model where `folder` lies in a Hugging Face hub cache: models--ORG--NAME/snapshots/REVISION."""
    path = folder.resolve()
    for snapshots in (path, *path.parents):
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--") and snapshots != path:
            return snapshots.parent
    return None


def contained(root: Path, name: str) -> Path:
    """The file of a bundle behind a name, where no symbolic link leads outside; in a hub cache links lead to its blobs.

    Raises:
        BundleError: it lies elsewhere.
        OSError: it is not there.
    """
    if not is_inside(name):
        raise BundleError(
            f"the manifest of {root} names {name!r}", expected="a file inside the bundle", fix="do not use it"
        )
    file = root / name
    found, model = file.resolve(strict=True), hub_model(root)
    if not found.is_relative_to(root.resolve()) and (model is None or found.parent != model / "blobs"):
        raise BundleError(
            f"{file} is a link that leads outside its bundle, to {found}",
            expected="a file inside the bundle; in a Hugging Face cache, one of the same model",
            fix="copy the file itself into the bundle",
        )
    return file


def read_checked(root: Path, record: FileRecord) -> bytes:
    """A file of a bundle, which is what its record says.

    Raises:
        BundleError: missing, outside the bundle, or damaged.
    """
    with _opened(root, record) as handle:
        data = handle.read(record.size_bytes + 1)
        _check_digest(root, record, hashlib.sha256(data).hexdigest())
        return data


def open_checked(root: Path, record: FileRecord, *, hashed: bool, memo: DigestMemo | None = None) -> BinaryIO:
    """The open file of a record, at its beginning, and checked: by its size alone where not `hashed`.

    `memo` saves hashing what it has seen hashed, and learns what is.

    Raises:
        BundleError: missing, outside the bundle, or damaged.
    """
    with _opened(root, record, closes=False) as handle:
        if hashed:
            found = memo.digest(handle, record.sha256) if memo is not None else digest_of_file(handle)
            _check_digest(root, record, found)
        handle.seek(0)
        return handle


def check_file(root: Path, record: FileRecord, *, hashed: bool) -> None:
    """`open_checked`, for a file that is not needed open."""
    open_checked(root, record, hashed=hashed).close()


@contextmanager
def _opened(root: Path, record: FileRecord, *, closes: bool = True) -> Iterator[BinaryIO]:
    """The record's file, of the right size; left open only where the block ends well and `closes` is False."""
    try:
        file = contained(root, record.file)
        if not stat.S_ISREG(file.stat().st_mode):
            raise BundleError(f"{file} is no file", fix=REBUILD)
        handle = file.open("rb")
    except (OSError, RuntimeError) as error:  # links in a circle
        raise _unreadable(root / record.file, error) from error
    try:
        size = os.fstat(handle.fileno()).st_size
        if size != record.size_bytes:
            raise BundleError(
                f"{file} is damaged: it has {size} bytes", expected=f"{record.size_bytes} bytes", fix=REBUILD
            )
        yield handle
    except OSError as error:
        handle.close()
        raise _unreadable(file, error) from error
    except BaseException:
        handle.close()
        raise
    if closes:
        handle.close()


def _unreadable(file: Path, error: Exception) -> BundleError:
    reason = error.strerror if isinstance(error, OSError) else error
    return BundleError(f"{file} cannot be read: {reason}", fix=REBUILD)


def _check_digest(root: Path, record: FileRecord, found: str) -> None:
    if found != record.sha256:
        raise BundleError(
            f"{root / record.file} is damaged: its sha256 is {found}", expected=f"sha256 {record.sha256}", fix=REBUILD
        )


def read_manifest(path: Path) -> tuple[bytes, Stamp]:
    """The bytes of a bundle's manifest, and which file they are of.

    Raises:
        BundleError: there is none, or one far too large.
        BeingReplaced: there is none at this moment.
    """
    try:
        with contained(path, MANIFEST).open("rb") as handle:
            stamp = _stamp(os.fstat(handle.fileno()))
            text = handle.read(MOST_MANIFEST_BYTES + 1)
    except (OSError, RuntimeError) as error:
        if any(siblings(path, "replaced")):
            raise BeingReplaced from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise BundleError(
            f"{path} is not a bundle: cannot read its {MANIFEST}: {reason}",
            expected="a folder made by `fastvar build`",
            fix="check the path, or build the bundle",
        ) from error
    if len(text) > MOST_MANIFEST_BYTES:
        raise BundleError(f"{path / MANIFEST} has more than {MOST_MANIFEST_BYTES} bytes", expected="a manifest")
    return text, stamp


def read_signature(path: Path) -> bytes:
    """Raises:
    BundleError: the bundle is not signed.
    """
    try:
        with contained(path, SIGNATURE).open("rb") as handle:
            return handle.read(SIGNATURE_BYTES + 1)
    except (OSError, RuntimeError) as error:
        raise BundleError(
            f"{path} is not signed",
            expected=f"a bundle with a {SIGNATURE}, for a signature is required",
            fix="sign it with `fastvar sign`, if it is yours; a rebuild drops the signature",
        ) from error


def stamp_of(path: Path) -> Stamp | None:
    """Which manifest lies in a folder now; None for none."""
    try:
        return _stamp((path / MANIFEST).stat())
    except OSError:
        return None


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
