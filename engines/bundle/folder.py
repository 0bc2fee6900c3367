"""Which files in a folder a build wrote, and the removal of those alone.

A bundle is known by its content: a manifest of ours, the files that it names, and what fastvar writes beside them.
Whatever else lies there is somebody's, and stays.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from ...core.files import TEMPORARY
from ...errors import BundleError
from ..cache.engine_cache import KERNELS

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
ENGINES = "engines"
JOURNAL = ".files"  # in a folder under construction: the names written so far, one a line
MOST_MANIFEST_BYTES = 64 << 20
_KERNEL_FILE = re.compile(r"[^/]+\.(kernels|timings)(\.lock)?")
_SHOWN = 5  # names of foreign files in an error

_log = logging.getLogger(__name__)


def beside(out: Path, state: str) -> str:
    """How names of a bundle's folders under construction or replaced begin; the number of a process follows."""
    return f".{out.name}.{state}-"


def siblings(out: Path, state: str) -> list[Path]:
    """The bundle's folders in a state, "building" or "replaced"; of its builds that run, or were killed."""
    prefix = beside(out, state)
    with suppress(OSError):
        names = sorted(os.listdir(out.parent))
        return [out.with_name(n) for n in names if n.startswith(prefix) and n[len(prefix) :].isdigit()]
    return []


def check_replaceable(out: Path) -> None:
    """Refuse a folder in which anything lies that no build wrote.

    Raises:
        BundleError: neither new, nor empty, nor a bundle and nothing else; names what is foreign.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise BundleError(f"{out} is there already and is not a bundle", expected="a folder", fix=_ANOTHER)
    ours = written_files(out)
    foreign = foreign_files(out, ours or ())
    if not foreign:
        return
    if ours is None:
        raise BundleError(
            f"{out} is there already and is not a bundle: it holds {_listed(foreign)}",
            expected=f"a new folder, an empty one, or a bundle with its {MANIFEST}",
            fix=_ANOTHER,
        )
    raise BundleError(
        f"the bundle {out} holds files that no build wrote: {_listed(foreign)}",
        expected="a bundle and nothing else: all of the folder is replaced",
        fix="move them elsewhere, or choose another folder",
    )


_ANOTHER = "choose another folder, or remove this one yourself"


def written_files(folder: Path) -> frozenset[str] | None:
    """Names, relative to the folder, that a build or the runtime may have written there; None where no bundle is.

    Manifests of all format versions are understood: each names a file together with its digest.
    """
    try:
        with (folder / MANIFEST).open("rb") as handle:
            data = json.loads(handle.read(MOST_MANIFEST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not _is_ours(data):
        return None
    named = {name for name in _named(data) if is_inside(name)}
    return frozenset({MANIFEST, SIGNATURE, *named})


def journalled_files(folder: Path) -> frozenset[str]:
    """Names in a folder where a bundle was under construction, or is one: its journal's and its manifest's."""
    try:
        noted = [*(folder / JOURNAL).read_text(encoding="utf-8").splitlines(), MANIFEST]
    except (OSError, ValueError):
        noted = []
    return frozenset({JOURNAL, *filter(is_inside, noted)}) | (written_files(folder) or frozenset())


def _is_ours(data: Any) -> bool:
    return (
        isinstance(data, dict)
        and type(data.get("format_version")) is int
        and isinstance(data.get("fastvar_version"), str)
        and isinstance(data.get("engines"), dict | list)
        and isinstance(data.get("weights"), dict)
        and isinstance(data["weights"].get("file"), str)
    )


def _named(data: Any) -> Iterator[str]:
    """Files that come with a digest, wherever in the manifest."""
    if isinstance(data, dict):
        if isinstance(data.get("file"), str) and isinstance(data.get("sha256"), str):
            yield data["file"]
        for value in data.values():
            yield from _named(value)
    elif isinstance(data, list):
        for value in data:
            yield from _named(value)


def is_inside(name: str) -> bool:
    """Whether a relative name stays inside its folder, on every system."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set("\\:\0") & set(name)


def foreign_files(folder: Path, ours: Collection[str]) -> list[str]:
    """What is not ours, by name relative to the folder; a folder ends with a slash."""
    return sorted(name for name, is_ours in _entries(folder, ours) if not is_ours)


def _entries(folder: Path, ours: Collection[str]) -> Iterator[tuple[str, bool]]:
    """Every file and folder with whether it is ours, what is in a folder before it; a foreign folder is one entry."""
    parents = {str(parent) for name in ours for parent in PurePosixPath(name).parents} - {"."}
    if ours:
        parents |= {ENGINES, KERNELS}
    return _under(folder, "", frozenset(ours), frozenset(parents))


def _under(folder: Path, prefix: str, ours: frozenset[str], parents: frozenset[str]) -> Iterator[tuple[str, bool]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = prefix + entry.name
        if not entry.is_dir(follow_symlinks=False):
            yield name, name in ours or _is_by_product(name, parents)
        elif name in parents:
            yield from _under(Path(entry.path), f"{name}/", ours, parents)
            yield f"{name}/", True
        else:
            yield f"{name}/", False


def _is_by_product(name: str, parents: Collection[str]) -> bool:
    """Kernels, and files that were never finished."""
    folder, _, file = name.rpartition("/")
    if file.startswith(TEMPORARY):
        return not folder or folder in parents
    return folder == KERNELS and KERNELS in parents and _KERNEL_FILE.fullmatch(file) is not None


def remove_written(folder: Path, ours: Collection[str]) -> list[str]:
    """Remove what is ours, file by file, and the folder with it if nothing else is there.

    Returns:
        What was left, by name relative to the folder.

    Raises:
        OSError: a file cannot be removed.
    """
    for name, is_ours in _entries(folder, ours):
        if is_ours and name.endswith("/"):
            with suppress(OSError):  # what others wrote there stays
                (folder / name).rmdir()
        elif is_ours:
            (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
    return foreign_files(folder, ours) if folder.exists() else []


def discard(folder: Path, out: Path, ours: Collection[str]) -> None:
    """Remove a bundle that was replaced, or one that a killed build left; keep what others wrote there, and say where.

    Raises:
        OSError: a file cannot be removed.
    """
    left = remove_written(folder, ours)
    if not folder.exists():
        return
    kept = _free(out.with_name(f"{out.name}.kept"))
    folder.rename(kept)
    _log.warning("%s came into %s from elsewhere while it was replaced: kept in %s", _listed(left), out, kept)


def _free(path: Path) -> Path:
    """The path, with a number behind it where it is taken."""
    found, number = path, 1
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
