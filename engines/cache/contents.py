"""What lies in the folder of kept engines: how large it is, when it was used last, and its removal.

Only files that fastvar names so are looked at; whatever else lies there stays. Several processes may share the folder:
what one removes, another makes anew.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, takewhile
from pathlib import Path

from ...core.files import TEMPORARY
from ...errors import BundleError
from .digest_memo import MEMO
from .engine_cache import KERNELS
from .product_speeds import SPEEDS

ENGINE, COMPILED, DIGESTS, UNFINISHED = "engine", "compiled on this machine", "digests of weights", "unfinished"
LISTING, MEASURED = "listings of hub repositories", "speeds of this CPU"
_ENTRY, _ENGINE = re.compile(r"([0-9a-f]{64})\.json"), re.compile(r"([0-9a-f]{64})\.engine")
_COMPILED_FOLDER = re.compile(rf"{KERNELS}(-[0-9a-f]{{16}})?")
_COMPILED_FILE = re.compile(r"libfastvar\.a|fastvar\.so|[^/]+\.(kernels|timings)")
_LISTING = re.compile(r"[0-9a-f]{64}\.listing")  # of hub/listing.py, which stands above this
# A process that writes for longer than this was killed.
ABANDONED_SECONDS = 3600


@dataclass(frozen=True)
class Item:
    """Files that are kept and removed together. `used` is when they were last written or read, in seconds of 1970."""

    kind: str
    files: tuple[Path, ...]
    size_bytes: int
    used: float


def contents(folder: Path) -> list[Item]:
    """What is kept, the one used last first; nothing where there is no folder.

    Raises:
        BundleError: the folder cannot be read.
    """
    try:
        found = _items(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BundleError(
            f"cannot read {folder}: {error.strerror}", fix="check the path and its permissions"
        ) from error
    return sorted(found, key=lambda item: item.used, reverse=True)


def evict(folder: Path, max_bytes: int) -> list[Item]:
    """Remove what was not used for longest, until the rest takes `max_bytes` at most.

    Returns:
        What was removed.

    Raises:
        BundleError: the folder cannot be read, or a file not removed.
    """
    items = contents(folder)
    ends = accumulate(item.size_bytes for item in items)
    # From the first that does not fit on all go: a small old one is not kept for its size.
    kept = sum(1 for _ in takewhile(lambda end: end <= max_bytes, ends))
    remove(items[kept:])
    return items[kept:]


def remove(items: Sequence[Item]) -> None:
    """Raises:
    BundleError: a file cannot be removed.
    """
    for item in items:
        for file in item.files:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise BundleError(f"cannot remove {file}: {error.strerror}", fix="check the permissions") from error
        for folder in {file.parent for file in item.files if _COMPILED_FOLDER.fullmatch(file.parent.name)}:
            with suppress(OSError):  # something else is in it
                folder.rmdir()


def _items(folder: Path) -> list[Item]:
    entries: dict[str, list[Path]] = {}
    items = []
    for file in _files(folder):
        inside, name = file.parent != folder, file.name
        if name.startswith(TEMPORARY):
            if time.time() - file.lstat().st_mtime > ABANDONED_SECONDS:
                items.append(_item(UNFINISHED, [file]))
        elif inside or _COMPILED_FILE.fullmatch(name):
            items += [_item(COMPILED, [file])] if _COMPILED_FILE.fullmatch(name) else []
        elif _LISTING.fullmatch(name):
            items.append(_item(LISTING, [file]))
        elif name == MEMO:
            items.append(_item(DIGESTS, [file]))
        elif name == SPEEDS:
            items.append(_item(MEASURED, [file]))
        elif _ENTRY.fullmatch(name):
            entries.setdefault(_digest_in(file), []).append(file)
        elif found := _ENGINE.fullmatch(name):
            entries.setdefault(found[1], []).append(file)
    # Entries before the engine that they share: nobody finds one whose engine is gone.
    items += [_item(ENGINE, sorted(files, key=lambda f: f.suffix == ".engine")) for files in entries.values()]
    return [item for item in items if item.files]


def _files(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
            elif entry.is_dir(follow_symlinks=False) and _COMPILED_FOLDER.fullmatch(entry.name):
                with os.scandir(entry.path) as inner:
                    yield from (Path(file.path) for file in inner if file.is_file(follow_symlinks=False))


def _digest_in(entry: Path) -> str:
    """The engine that an entry names; the entry's own name where it names none."""
    try:
        data = json.loads(entry.read_bytes())
        return str(data["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return entry.name


def _item(kind: str, files: Sequence[Path]) -> Item:
    """Of files that are still there."""
    found = []
    for file in files:
        with suppress(FileNotFoundError):
            found.append((file, file.lstat()))
    there = [(file, status) for file, status in found if stat.S_ISREG(status.st_mode)]
    used = max((status.st_mtime for _, status in there), default=0.0)
    return Item(kind, tuple(file for file, _ in there), sum(status.st_size for _, status in there), used)
