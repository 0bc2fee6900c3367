"""A repository of the hub at one commit: what it holds, what of that is here, and the download of the rest.

The library downloads, resumes, and keeps its cache, whose layout it documents: models--ORG--NAME with refs/REVISION,
blobs/ and snapshots/COMMIT. It reads its environment when it is imported, so it is imported when it is first asked.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core.dtypes import human_bytes
from ..core.platform import import_extra
from ..errors import HubError
from .listing import Listing, keep_listing, kept_listing, listing_of, listing_of_folder
from .reference import COMMIT, HubReference
from .trouble import OFFLINE_FIX, cache_root, hub_trouble


@dataclass(frozen=True)
class HubAccess:
    """How the hub is asked: by its own token or the environment's, into which cache, or not at all."""

    token: str | bool | None = field(default=None, repr=False)  # None: HF_TOKEN, or that of the login
    cache_dir: Path | None = None  # None: the library's
    offline: bool = False

    @property
    def is_offline(self) -> bool:
        """Whether nothing may be asked, by this or by HF_HUB_OFFLINE."""
        return self.offline or bool(import_extra("huggingface_hub.constants", "hub").HF_HUB_OFFLINE)

    @property
    def root(self) -> Path:
        """The cache."""
        return (self.cache_dir or Path(cache_root())).expanduser().absolute()


@dataclass(frozen=True)
class Repository:
    """A repository, pinned."""

    reference: HubReference
    access: HubAccess
    listing: Listing

    @classmethod
    def open(cls, reference: HubReference, access: HubAccess) -> Repository:
        """Find the commit of a revision, and what it holds. A commit that was seen before is not asked for again.

        Raises:
            HubError: no such repository or revision, no access, no connection; offline, and not in the cache.
            BackendError: huggingface_hub is not installed.
        """
        if access.is_offline:
            return cls(reference, access, _known(reference, access))
        pinned = COMMIT.fullmatch(reference.revision) is not None
        listing = kept_listing(reference.repository, reference.revision) if pinned else None
        return cls(reference, access, listing or _asked(reference, access))

    @property
    def commit(self) -> str:
        """40 hexadecimal digits."""
        return self.listing.commit

    @property
    def snapshot(self) -> Path:
        """The folder of what was downloaded of this commit."""
        return _folder(self.reference, self.access) / "snapshots" / self.commit

    def missing(self, names: Collection[str]) -> list[str]:
        """Which of these files are not here yet, the smallest first.

        Raises:
            HubError: the repository holds no such file.
        """
        for name in names:
            if name not in self.listing.files:
                raise HubError(
                    f"{self.reference.repository} has no file {name!r} at {self.reference.revision}",
                    expected=f"one of {_some(self.listing.files)}",
                    fix="check the spelling, or name another revision",
                )
        sizes = {name: self.listing.files[name].size for name in dict.fromkeys(names)}
        return sorted((name for name in sizes if not self._is_here(name)), key=lambda name: (sizes[name], name))

    def fetch(self, names: Collection[str]) -> Path:
        """Bring files here, and check all of them against their digests.

        Returns:
            The folder that holds them under their names. They are links into the cache.

        Raises:
            HubError: a file is not in the repository, cannot be downloaded or saved, or arrived damaged.
        """
        missing = self.missing(names)
        if missing and self.access.is_offline:
            raise HubError(
                f"of {self.reference} {len(missing)} files were not downloaded yet, and the hub may not be asked: "
                f"{_some(missing)}",
                fix=OFFLINE_FIX,
            )
        check_space(self.access, self.listing.bytes_of(missing))
        # The first one is asked for by the revision's own name: so the library notes which commit that is.
        named = self.reference.revision
        if named != self.commit and not self.access.is_offline and (missing or self._noted_commit() != self.commit):
            self._download((missing or sorted(names))[0], named)
        for name in missing:
            self._download(name, self.commit)
        for name in names:
            self._check(name)
        return self.snapshot

    def _is_here(self, name: str) -> bool:
        try:
            return (self.snapshot / name).stat().st_size == self.listing.files[name].size
        except OSError:
            return False

    def _noted_commit(self) -> str:
        return _noted(_folder(self.reference, self.access), self.reference.revision)

    def _download(self, name: str, revision: str) -> None:
        reference = replace(self.reference, file=name)
        with hub_trouble(reference):
            found = import_extra("huggingface_hub", "hub").hf_hub_download(
                self.reference.repository,
                name,
                revision=revision,
                cache_dir=self.access.root,
                token=self.access.token,
                force_download=(self.snapshot / name).exists() and not self._is_here(name),
            )
        if not Path(found).is_relative_to(self.snapshot):
            raise HubError(f"{self.reference} was changed while it was downloaded", fix="try again")

    def _check(self, name: str) -> None:
        path = self.snapshot / name
        with hub_trouble(replace(self.reference, file=name)):
            damage = self.listing.files[name].damage(path)
        if damage:
            raise HubError(
                f"{name} of {self.reference} is damaged: {damage}",
                expected="the file as the hub lists it",
                fix=f"remove {path.resolve()} and start again",
            )


def check_space(access: HubAccess, needed: int) -> None:
    """Raises:
    HubError: the disk of the cache has no room for so many bytes.
    """
    place = access.root
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise HubError(
            f"the download takes {human_bytes(needed)}, and {human_bytes(free)} are free on the disk of {access.root}",
            fix="free some space, or move the cache with HF_HOME",
        )


def _asked(reference: HubReference, access: HubAccess) -> Listing:
    """What the hub says of a revision."""
    with hub_trouble(reference):
        api = import_extra("huggingface_hub", "hub").HfApi(token=access.token)
        found = api.model_info(reference.repository, revision=reference.revision, files_metadata=True)
        if not isinstance(found.sha, str) or not COMMIT.fullmatch(found.sha):
            raise ValueError(f"it names the commit {found.sha!r}")
        listing = listing_of(reference.repository, found.sha, found.siblings or ())
    keep_listing(listing)
    return listing


def _known(reference: HubReference, access: HubAccess) -> Listing:
    """What is known of a revision without asking."""
    folder, revision = _folder(reference, access), reference.revision
    commit = revision if COMMIT.fullmatch(revision) else _noted(folder, revision)
    snapshot = folder / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        raise HubError(
            f"{reference} is not in {access.root}, and the hub may not be asked",
            expected="a repository that was downloaded before",
            fix=OFFLINE_FIX,
        )
    return kept_listing(reference.repository, commit) or listing_of_folder(reference.repository, commit, snapshot)


def _noted(folder: Path, revision: str) -> str:
    """The commit that a revision was when it was last asked for; empty where it never was."""
    try:
        text = (folder / "refs" / revision).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
    return text if COMMIT.fullmatch(text) else ""


def _folder(reference: HubReference, access: HubAccess) -> Path:
    return access.root / f"models--{reference.repository.replace('/', '--')}"


def _some(names: Collection[str], most: int = 8) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
