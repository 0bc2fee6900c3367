"""A bundle on disk: a folder with manifest.json, weights.safetensors, tokenizer.json and engines/.

Writes it so that it is there as a whole or not at all, and hands out nothing whose digest was not checked.
Knows files and digests; never opens an engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import BundleError, FastvarError, InternalError
from .lock import FolderLock
from .manifest import EngineSpec, FileRecord, Manifest, manifest_from_json, manifest_to_json

MANIFEST = "manifest.json"
# Larger weight files are hashed only when asked: 4 GiB take seconds, a wrong size is noticed either way.
HASHED_WEIGHTS_BYTES = 256 << 20
VERIFY_MODES = ("auto", "all")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `digest` is the sha256 of manifest.json, and so names everything in the bundle."""

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: str | Path, verify: str = "auto") -> Bundle:
        """Read the manifest and check the files against it.

        Args:
            path: folder made by `fastvar build`.
            verify: "auto" hashes engines and tokenizer, and weights up to 256 MiB (larger ones by size only);
                "all" hashes everything.

        Raises:
            BundleError: not a bundle, made for another version, incomplete or damaged.
        """
        if verify not in VERIFY_MODES:
            raise BundleError(f"verify {verify!r} not understood", expected=f"one of {', '.join(VERIFY_MODES)}")
        path = Path(path)
        text = _read_manifest(path)
        bundle = cls(path, _parse_manifest(path, text), hashlib.sha256(text).hexdigest())
        for record in bundle.files():
            is_weights = record == bundle.manifest.weights
            hashed = verify == "all" or not is_weights or record.size_bytes <= HASHED_WEIGHTS_BYTES
            _check_file(path, record, hashed=hashed)
        return bundle

    def files(self) -> tuple[FileRecord, ...]:
        """Every file that the manifest names, once each."""
        manifest = self.manifest
        engines = (FileRecord(spec.file, spec.sha256, spec.size_bytes) for spec in manifest.engines.values())
        return tuple(dict.fromkeys((*engines, *manifest.side_files, manifest.weights)))

    def read_engine(self, spec: EngineSpec) -> bytes:
        """Bytes of an engine, checked once more: the file may have changed since the bundle was opened.

        Raises:
            BundleError: missing or changed.
        """
        record = FileRecord(spec.file, spec.sha256, spec.size_bytes)
        with _readable(self.path, record) as file:
            data = file.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != record.sha256:
            raise _changed(self.path, record, found)
        return data


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
        self._building = self.out.with_name(f"{self._prefix('building')}{os.getpid()}")
        self._replaced = self.out.with_name(f"{self._prefix('replaced')}{os.getpid()}")
        self._by_digest: dict[str, str] = {}
        self._linked: set[Path] = set()  # brought to the disk with the bundle that they come from

    def _prefix(self, state: str) -> str:
        return f".{self.out.name}.{state}-"

    def __enter__(self) -> BundleWriter:
        with _disk(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            with _disk(self.out):
                self._clear_leftovers()
                _check_replaceable(self.out)
                (self._building / "engines").mkdir(parents=True)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            shutil.rmtree(self._building, ignore_errors=True)
        finally:
            self._lock.release()

    def path(self, file: str) -> Path:
        """Where to write a file of the bundle."""
        return self._building / file

    def add_engine(self, name: str, data: bytes, suffix: str) -> tuple[str, str, int]:
        """Store an engine; equal content is stored once, under the first name it came with.

        Returns:
            (file relative to the bundle, sha256, size in bytes).
        """
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._by_digest:
            file = f"engines/{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}-{digest[:8]}{suffix}"
            with _disk(self.path(file)):
                self.path(file).write_bytes(data)
            self._by_digest[digest] = file
        return self._by_digest[digest], digest, len(data)

    def add_file(self, source: Path, file: str) -> FileRecord:
        """Copy a file into the bundle."""
        with _disk(self.path(file)):
            shutil.copyfile(source, self.path(file))
            return FileRecord(file, _digest(self.path(file)), self.path(file).stat().st_size)

    def link_file(self, source: Path, record: FileRecord) -> bool:
        """Take over a file of another bundle as it is: the same file on the disk where the file system can, else a
        copy.

        Returns:
            Whether it is the same file.

        Raises:
            BundleError: the copy is not what the record says, or the disk is full.
        """
        target = self.path(record.file)
        try:
            # Resolved: a link to a symbolic link would lead nowhere.
            os.link(source.resolve(), target)
        except OSError:  # another file system, or one without links
            with _disk(target):
                shutil.copyfile(source, target)
            _check_file(self._building, record, hashed=True)
            return False
        self._linked.add(target)
        return True

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, bring everything to the disk, and put the bundle in its place.

        Raises:
            InternalError: the manifest names a file that was not written.
            BundleError: the disk is full or the folder cannot be written.
        """
        bundle = Bundle(self._building, manifest, "")
        for record in bundle.files():
            if not self.path(record.file).is_file():
                raise InternalError(f"the manifest names {record.file!r}, which was not written")
        with _disk(self.out):
            text = json.dumps(manifest_to_json(manifest), indent=1, sort_keys=True, allow_nan=False)
            self.path(MANIFEST).write_text(text + "\n", encoding="utf-8")
            _sync_tree(self._building, self._linked)
            _check_replaceable(self.out)
            self._swap()

    def _swap(self) -> None:
        """Two renames; between them only a killed process leaves no bundle, and the next build restores it."""
        replaces = self.out.exists()
        if replaces:
            self.out.rename(self._replaced)
        try:
            self._building.rename(self.out)
        except OSError:
            if replaces:
                self._replaced.rename(self.out)
            raise
        _sync_folder(self.out.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        """Of killed builds; the lock is ours, so no such folder is in use."""
        replaced = sorted(_siblings(self.out, self._prefix("replaced")))
        if replaced and not self.out.exists():
            replaced.pop().rename(self.out)
        for folder in (*replaced, *_siblings(self.out, self._prefix("building"))):
            shutil.rmtree(folder)


def _siblings(out: Path, prefix: str) -> Iterator[Path]:
    return (p for p in out.parent.iterdir() if p.name.startswith(prefix) and p.name[len(prefix) :].isdigit())


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Full disks and missing permissions, as errors of the bundle."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"cannot write {error.filename or path}: {error.strerror}", fix="check the free space and the permissions"
        ) from error


def _check_replaceable(out: Path) -> None:
    if not out.exists() or (out / MANIFEST).is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise BundleError(
            f"{out} is there already and is not a bundle",
            expected=f"a new folder, an empty one, or a bundle with its {MANIFEST}",
            fix="choose another folder, or remove this one yourself",
        )


def _sync_tree(root: Path, synced: Collection[Path] = ()) -> None:
    for folder, _, files in os.walk(root):
        for file in {Path(folder) / name for name in files}.difference(synced):
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and need not be
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(path: Path) -> bytes:
    try:
        return (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path} is not a bundle: cannot read its {MANIFEST}: {error.strerror}",
            expected="a folder made by `fastvar build`",
            fix="check the path, or build the bundle",
        ) from error


def _parse_manifest(path: Path, text: bytes) -> Manifest:
    rebuild = "copy the bundle again, or rebuild it with `fastvar build`"
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST} is not JSON: {error}", fix=rebuild) from error
    if not isinstance(data, dict):
        raise BundleError(f"{path / MANIFEST} holds a {type(data).__name__}", expected="a JSON object", fix=rebuild)
    try:
        manifest = manifest_from_json(data)
        _check_types(manifest)
    except BundleError:
        raise
    except (FastvarError, AttributeError, TypeError) as error:  # a plan that this version refuses, or a wrong type
        raise BundleError(f"{path / MANIFEST} not understood: {error}", fix=rebuild) from error
    return manifest


def _check_types(manifest: Manifest) -> None:
    """The fields that lead to files are what they are annotated to be; JSON could hold anything."""
    records: list[FileRecord | EngineSpec] = [manifest.weights, *manifest.engines.values()]
    records += manifest.side_files
    for record in records:
        if not (isinstance(record.file, str) and isinstance(record.sha256, str) and type(record.size_bytes) is int):
            raise TypeError(f"a file is described as {record.file!r}, {record.sha256!r}, {record.size_bytes!r}")


def is_bundle(path: Path) -> bool:
    """Whether a folder holds a manifest, of whatever worth."""
    return (path / MANIFEST).is_file()


@contextmanager
def _readable(root: Path, record: FileRecord) -> Iterator[Path]:
    """The record's file, of the right size; a manifest must not lead outside its bundle."""
    relative = PurePosixPath(record.file)
    if relative.is_absolute() or ".." in relative.parts or any(c in record.file for c in "\\:\0"):
        raise BundleError(
            f"the manifest of {root} names {record.file!r}", expected="a file inside the bundle", fix="do not use it"
        )
    file = root / relative
    try:
        size = file.stat().st_size
        if size != record.size_bytes:
            raise BundleError(
                f"{file} is damaged: it has {size} bytes",
                expected=f"{record.size_bytes} bytes",
                fix="copy the bundle again, or rebuild it with `fastvar build`",
            )
        yield file
    except OSError as error:
        raise BundleError(
            f"{file} cannot be read: {error.strerror}", fix="copy the bundle again, or rebuild it with `fastvar build`"
        ) from error


def _check_file(root: Path, record: FileRecord, *, hashed: bool) -> None:
    with _readable(root, record) as file:
        if hashed and (found := _digest(file)) != record.sha256:
            raise _changed(root, record, found)


def _changed(root: Path, record: FileRecord, found: str) -> BundleError:
    return BundleError(
        f"{root / record.file} is damaged: its sha256 is {found}",
        expected=f"sha256 {record.sha256}",
        fix="copy the bundle again, or rebuild it with `fastvar build`",
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
