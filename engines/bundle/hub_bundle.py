"""Bundles in repositories of the Hugging Face hub: the files that a manifest names, and no others, are downloaded.

They lie in the hub's cache as links into it, which a bundle's files may be there and nowhere else (`files.contained`).
"""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path
from typing import Any

from ...core.arguments import shown
from ...errors import BundleError, InputError
from ...hub.reference import PREFIX, HubReference, is_reference, parse_reference
from ...hub.repository import HubAccess, Repository
from .folder import MANIFEST, SIGNATURE, written_files

_PLAIN_NAME = re.compile(r"[^/\\@:\s.][^/\\@:\s]*/[^/\\@:\s]+")  # ORG/NAME, and no ./ or ../ before it


def found_bundle(
    repo_or_folder: Any,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Where a bundle lies: a folder, or what is downloaded of hub:ORG/NAME, or of ORG/NAME where no such folder is.

    Raises:
        InputError: neither text nor a path, or a revision of a folder.
        HubError, BundleError, BackendError: as `fetch_bundle`.
    """
    if not isinstance(repo_or_folder, str | PathLike):
        kind = type(repo_or_folder).__name__
        raise InputError(f"{shown(repo_or_folder)} is a {kind}", expected="the folder of a bundle, or ORG/NAME")
    name = repo_or_folder if isinstance(repo_or_folder, str) else ""
    if _PLAIN_NAME.fullmatch(name) and not Path(name).exists():
        name = PREFIX + name
    if not is_reference(name):
        if revision is not None:
            raise InputError(
                f"a folder has no revision {revision!r}", expected="a repository of the hub", fix="leave it away"
            )
        return Path(repo_or_folder)
    access = HubAccess(token, None if cache_dir is None else Path(cache_dir), local_files_only)
    return fetch_bundle(parse_reference(name, revision), access)


def fetch_bundle(reference: HubReference, access: HubAccess) -> Path:
    """Download a bundle, and say where it lies.

    Raises:
        BundleError: the repository holds none, or not the whole of one.
        HubError: it cannot be read or downloaded.
        BackendError: huggingface_hub is not installed.
    """
    repository = Repository.open(reference.whole(), access)
    held = repository.listing.files
    if MANIFEST not in held:
        raise BundleError(
            f"{reference} is not a bundle: it has no {MANIFEST}",
            expected="the files of a folder made by `fastvar build`, at the top of the repository",
            fix=f"if it is a model, build it: fastvar build {reference} --out bundle",
        )
    folder = repository.fetch([MANIFEST])
    names = written_files(folder)
    if names is None:
        raise BundleError(f"{reference} is not a bundle: its {MANIFEST} is another program's", fix="check the name")
    if missing := sorted(names - held.keys() - {SIGNATURE}):
        raise BundleError(
            f"{reference} holds half a bundle: {missing[0]} is missing, which its {MANIFEST} names",
            expected=f"all {len(names)} files that `fastvar build` wrote",
            fix="upload the whole folder",
        )
    return repository.fetch(sorted(names & held.keys()))
