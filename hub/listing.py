"""What a repository holds at a commit: names, sizes and digests of its files.

A commit never changes. So its listing is kept in the folder of kept engines, and nobody is asked for it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ..core.files import BLOCK_BYTES
from ..engines.cache.digest_memo import DigestMemo
from ..engines.cache.engine_cache import default_folder, read_shared, save_shared

SUFFIX = ".listing"


class HubFile(msgspec.Struct, frozen=True):
    """A file of a repository. A large one goes by the sha256 of its content, a small one by git's name for it."""

    size: int
    sha256: str | None = None
    blob: str | None = None

    def damage(self, path: Path) -> str:
        """What is wrong with a downloaded file; empty for nothing.

        Raises:
            OSError: it cannot be read.
        """
        with path.open("rb") as handle:
            size = path.stat().st_size
            if size != self.size:
                return f"it has {size} bytes instead of {self.size}"
            if self.sha256 is not None:
                found, expected = DigestMemo().digest(handle, self.sha256), self.sha256
            elif self.blob is not None:
                found, expected = _git_name(handle, size), self.blob
            else:
                return ""
        return "" if found == expected else f"its digest is {found} instead of {expected}"


class Listing(msgspec.Struct, frozen=True):
    """All files of a repository at a commit, by name."""

    repository: str
    commit: str
    files: dict[str, HubFile]

    def bytes_of(self, names: Iterable[str]) -> int:
        """What these files take together."""
        return sum(self.files[name].size for name in names)


def listing_of(repository: str, commit: str, siblings: Iterable[Any]) -> Listing:
    """From what the library tells of each file; names that lead out of a folder are left out."""
    files = {}
    for sibling in siblings:
        large = sibling.lfs
        sha256 = large.get("sha256") if isinstance(large, Mapping) else getattr(large, "sha256", None)
        if _stays_inside(sibling.rfilename) and sibling.size is not None:
            files[sibling.rfilename] = HubFile(sibling.size, sha256, None if sha256 else sibling.blob_id)
    return Listing(repository, commit, files)


def listing_of_folder(repository: str, commit: str, snapshot: Path) -> Listing:
    """Of what was downloaded, where nothing else is known of the commit."""
    files = {file.relative_to(snapshot).as_posix(): file for file in sorted(snapshot.rglob("*")) if file.is_file()}
    return Listing(repository, commit, {name: HubFile(file.stat().st_size) for name, file in files.items()})


def kept_listing(repository: str, commit: str) -> Listing | None:
    """One that was seen before."""
    text = read_shared(_path(repository, commit))
    try:
        found = msgspec.json.decode(text, type=Listing) if text else None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    fits = found is not None and (found.repository, found.commit) == (repository, commit)
    return found if fits else None


def keep_listing(listing: Listing) -> None:
    """Save one for later; where it cannot be saved, the hub is asked again."""
    save_shared(_path(listing.repository, listing.commit), msgspec.json.encode(listing))


def _path(repository: str, commit: str) -> Path:
    return default_folder() / (hashlib.sha256(f"{repository}@{commit}".encode()).hexdigest() + SUFFIX)


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _git_name(handle: Any, size: int) -> str:
    """What git calls a file of this content."""
    digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    while block := handle.read(BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
