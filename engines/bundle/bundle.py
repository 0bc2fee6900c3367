"""A bundle on disk: a folder with manifest.json, weights.safetensors, tokenizer.json and engines/.

Writes it so that it is there as a whole or not at all, and hands out nothing whose digest was not checked.
Knows files and digests; never opens an engine.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ...core.files import BLOCK_BYTES, digest_of_file, exchange, sync_file, sync_folder, whole_file, write_whole
from ...errors import BundleError, InternalError
from ..cache.digest_memo import DigestMemo
from ..cache.engine_cache import KERNELS, default_folder
from ..cache.lock import FolderLock
from ..registry import BACKEND_NAMES, backend_class
from ..spec import EngineSpec
from .files import (
    BeingReplaced,
    Stamp,
    check_file,
    hub_model,
    open_checked,
    read_checked,
    read_manifest,
    read_signature,
    stamp_of,
)
from .folder import (
    ENGINES,
    JOURNAL,
    MANIFEST,
    beside,
    check_replaceable,
    discard,
    journalled_files,
    siblings,
    written_files,
)
from .manifest import FileRecord, Manifest
from .manifest_file import parse_manifest, print_manifest
from .signature import check_signature, read_public_key
from .weight_file import WeightFile

# Larger weight files are hashed only when asked: 4 GiB take seconds, a wrong size is noticed either way.
HASHED_WEIGHTS_BYTES = 256 << 20
VERIFY_MODES = ("auto", "all")
# A bundle that is being replaced is absent between two renames.
_SWAP_SECONDS = 0.2


@dataclass(frozen=True)
class Opening:
    """How a bundle is opened: what is checked, and what is allowed. Can be given to another process."""

    verify: str = "auto"
    trust_remote_code: bool = False
    public_key: bytes | None = None  # in PEM, of the signature that is required

    def __post_init__(self) -> None:
        if self.verify not in VERIFY_MODES:
            raise BundleError(f"verify {self.verify!r} not understood", expected=f"one of {', '.join(VERIFY_MODES)}")

    def hashes(self, weights: FileRecord) -> bool:
        """Whether the weight file is hashed. All other files always are."""
        signed = self.public_key is not None
        return self.verify == "all" or signed or weights.size_bytes <= HASHED_WEIGHTS_BYTES


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: what was in the folder at one moment, whatever becomes of the folder.

    Engines and small files are held as bytes, the weights as a mapped file: another build into the folder changes
    nothing for who has it open. `digest` is the sha256 of `text`, the manifest as it was read, and so names everything
    in the bundle.
    """

    path: Path
    manifest: Manifest
    digest: str
    text: bytes = field(repr=False)
    weights: WeightFile = field(repr=False)
    opening: Opening
    _contents: Mapping[str, bytes] = field(repr=False)
    _stamp: Stamp = field(repr=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        verify: str = "auto",
        *,
        trust_remote_code: bool = False,
        require_signature: str | Path | bytes | None = None,
    ) -> Bundle:
        """Read the manifest, check the files against it, and take hold of them.

        Args:
            path: folder made by `fastvar build`.
            verify: "auto" hashes engines and tokenizer, and weights up to 256 MiB (larger ones by size only);
                "all" hashes everything, large weights once: their digest is remembered by path, size and time.
            trust_remote_code: allow native code in a bundle that lies in a Hugging Face hub cache.
            require_signature: a public Ed25519 key in PEM, or its file: refuse, before anything is parsed, a bundle
                that its owner did not sign, then hash everything.

        Raises:
            BundleError: not a bundle, made for another version, incomplete or damaged; or not trusted.
            BackendError: a signature is required, and the package cryptography is not installed.
        """
        key = None if require_signature is None else read_public_key(require_signature)
        return cls.open_with(Path(path), Opening(verify, trust_remote_code, key))

    @classmethod
    def open_with(cls, path: Path, opening: Opening, *, remember: bool = True) -> Bundle:
        """`open`, as another process was told to. `remember`: large weights are hashed once a machine."""
        memo = DigestMemo() if remember and opening.public_key is None else None
        try:
            return cls._read(path, opening, memo)
        except BeingReplaced:
            time.sleep(_SWAP_SECONDS)
        try:
            return cls._read(path, opening, memo)
        except BeingReplaced as error:
            raise BundleError(f"{path} is replaced again and again while it is read", fix="try again") from error

    @classmethod
    def _read(cls, path: Path, opening: Opening, memo: DigestMemo | None) -> Bundle:
        """One attempt.

        Raises:
            BeingReplaced: another bundle is in the folder now.
        """
        text, stamp = read_manifest(path)
        try:
            if opening.public_key is not None:
                check_signature(text, read_signature(path), opening.public_key, str(path))
            bundle = cls._of(path, opening, text, stamp, memo)
        except BundleError as error:
            if stamp_of(path) != stamp:
                raise BeingReplaced from error
            raise
        if not bundle.is_current():  # files of two builds may have been mixed
            raise BeingReplaced
        return bundle

    @classmethod
    def _of(cls, path: Path, opening: Opening, text: bytes, stamp: Stamp, memo: DigestMemo | None) -> Bundle:
        manifest = parse_manifest(path / MANIFEST, text)
        if not opening.trust_remote_code:
            _refuse_remote_code(path, manifest)
        contents = {record.file: read_checked(path, record) for record in manifest.files if record != manifest.weights}
        record = manifest.weights
        large = record.size_bytes > HASHED_WEIGHTS_BYTES
        with open_checked(path, record, hashed=opening.hashes(record), memo=memo if large else None) as handle:
            weights = WeightFile(path / record.file, handle)
        return cls(path, manifest, hashlib.sha256(text).hexdigest(), text, weights, opening, contents, stamp)

    def read(self, record: FileRecord | EngineSpec) -> bytes:
        """A file beside the weights, as it was when the bundle was opened.

        Raises:
            BundleError: the bundle holds no such file.
        """
        try:
            return self._contents[record.file]
        except KeyError:
            raise BundleError(
                f"{self.path} holds no file {record.file!r}",
                expected="a file inside the bundle",
                fix="check its manifest",
            ) from None

    def read_engine(self, spec: EngineSpec) -> bytes:
        """Bytes of an engine, as they were when the bundle was opened.

        Raises:
            BundleError: the bundle holds no such engine.
        """
        return self.read(spec)

    @property
    def kernel_folder(self) -> Path:
        """Where a library keeps what it compiles: in the bundle, unless that is signed or belongs to a hub cache."""
        apart = self.opening.public_key is not None or hub_model(self.path) is not None
        return default_folder() / KERNELS if apart else self.path / KERNELS

    @property
    def holds_native_code(self) -> bool:
        """Whether loading its engines runs code that came with it."""
        return backend_class(self.manifest.backend).native_code

    def is_current(self) -> bool:
        """Whether the folder still holds this bundle."""
        return stamp_of(self.path) == self._stamp


class BundleWriter:
    """Builds a bundle beside its destination and swaps it in when committed.

    Used as a context manager. Left without `commit`, or by an exception, it leaves no trace and the bundle that
    was there untouched. What a killed build left behind is cleared by the next.

    Raises:
        BundleError: another build into the same folder is running, the folder holds something else than a
            bundle, or cannot be written.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out).resolve()
        if not self.out.name:
            raise BundleError(f"{self.out} cannot be a bundle", expected="a folder with a name")
        self._lock = FolderLock(self.out)
        self._building = self.out.with_name(f"{beside(self.out, 'building')}{os.getpid()}")
        self._replaced = self.out.with_name(f"{beside(self.out, 'replaced')}{os.getpid()}")
        self._by_digest: dict[str, str] = {}
        self._noted: set[str] = set()
        self._linked: set[Path] = set()  # brought to the disk with the bundle that they come from

    def __enter__(self) -> BundleWriter:
        with _disk(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            with _disk(self.out):
                self._clear_leftovers()
                check_replaceable(self.out)
                (self._building / ENGINES).mkdir(parents=True)
                write_whole(self._building / JOURNAL, b"")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            with suppress(OSError):
                discard(self._building, self.out, journalled_files(self._building))
        finally:
            self._lock.release()

    def path(self, file: str) -> Path:
        """Where to write a file of the bundle. Its name is noted first: a killed build's leavings are known by it.

        Raises:
            BundleError: the disk is full or the folder cannot be written.
        """
        path = self._building / file
        if file not in self._noted:
            with _disk(path), (self._building / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(f"{file}\n")
            self._noted.add(file)
        return path

    def add_engine(self, name: str, data: bytes, suffix: str) -> tuple[str, str, int]:
        """Store an engine; equal content is stored once, under the first name it came with.

        Returns:
            (file relative to the bundle, sha256, size in bytes).
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._by_digest:
            file = f"{ENGINES}/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{digest[:8]}{suffix}"
            with _disk(self.path(file)):
                write_whole(self.path(file), data)
            self._by_digest[digest] = file
        return self._by_digest[digest], digest, len(data)

    def add_file(self, source: Path, file: str) -> FileRecord:
        """Copy a file into the bundle."""
        target = self.path(file)
        with _disk(target):
            _copy(source, target)
            with target.open("rb") as handle:
                return FileRecord(file, digest_of_file(handle), target.stat().st_size)

    def link_file(self, source: Path, record: FileRecord) -> bool:
        """Take over a file of another bundle as it is: the same file on the disk where the file system can, else a
        copy.

        Returns:
            Whether it is the same file.

        Raises:
            BundleError: the file is not what the record says, or the disk is full.
        """
        target = self.path(record.file)
        try:
            # Resolved: a link to a symbolic link would lead nowhere.
            os.link(source.resolve(), target)
        except OSError:  # another file system, or one without links
            with _disk(target):
                _copy(source, target)
            check_file(self._building, record, hashed=True)
            return False
        # The other bundle may have been replaced since its digests were checked.
        check_file(self._building, record, hashed=record.size_bytes <= HASHED_WEIGHTS_BYTES)
        self._linked.add(target)
        return True

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, bring everything to the disk, and put the bundle in its place.

        Raises:
            InternalError: the manifest names a file that was not written.
            BundleError: the disk is full, the folder cannot be written, or somebody has put a file into it meanwhile.
        """
        for record in manifest.files:
            if not self.path(record.file).is_file():
                raise InternalError(f"the manifest names {record.file!r}, which was not written")
        with _disk(self.out):
            write_whole(self.path(MANIFEST), print_manifest(manifest))
            for folder, _, files in os.walk(self._building):
                for file in {Path(folder) / name for name in files} - self._linked:
                    sync_file(file)
                sync_folder(Path(folder))
            check_replaceable(self.out)
            self._swap()

    def _swap(self) -> None:
        """The new bundle and the one that is there trade places in one step, where the system can do that."""
        (self._building / JOURNAL).unlink()  # from here on the manifest says what is in it
        replaces = self.out.exists()
        exchanged = replaces and exchange(self._building, self.out)
        if not exchanged:
            self._rename(replaces)
        sync_folder(self.out.parent)
        if replaces:
            old = self._building if exchanged else self._replaced
            with suppress(OSError):
                discard(old, self.out, written_files(old) or ())

    def _rename(self, replaces: bool) -> None:
        """Two renames; between them only a killed process leaves no bundle, and the next build restores it."""
        if replaces:
            self.out.rename(self._replaced)
        try:
            self._building.rename(self.out)
        except OSError:
            if replaces:
                self._replaced.rename(self.out)
            raise

    def _clear_leftovers(self) -> None:
        """Of killed builds; the lock is ours, so no such folder is in use."""
        replaced = siblings(self.out, "replaced")
        whole = [folder for folder in replaced if written_files(folder) is not None]
        if whole and not self.out.exists():
            whole[-1].rename(self.out)
            replaced.remove(whole[-1])
        for folder in (*replaced, *siblings(self.out, "building")):
            discard(folder, self.out, journalled_files(folder))


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Full disks and missing permissions, as errors of the bundle."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"cannot write {error.filename or path}: {error.strerror}", fix="check the free space and the permissions"
        ) from error


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as given, whole_file(target) as copy:
        shutil.copyfileobj(given, copy, BLOCK_BYTES)


def _refuse_remote_code(path: Path, manifest: Manifest) -> None:
    if hub_model(path) is not None and backend_class(manifest.backend).native_code:
        harmless = " or ".join(name for name in BACKEND_NAMES if not backend_class(name).native_code)
        raise BundleError(
            f"{path} came from a hub and holds native code: engines of {manifest.backend}, which can do anything here",
            expected="trust_remote_code=True (--trust-remote-code), from who trusts its maker",
            fix=f"use a bundle for {harmless}, which runs no code of its own; or build from the checkpoint",
        )


def is_bundle(path: Path) -> bool:
    """Whether a folder holds a manifest, of whatever worth."""
    return (path / MANIFEST).is_file()
