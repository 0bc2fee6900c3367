"""Files that a new bundle takes over from another: the same file on the disk, or a copy, and never an unchecked one."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fastvar.engines.bundle import bundle as bundle_module
from fastvar.engines.bundle.bundle import Bundle, BundleWriter
from fastvar.engines.bundle.manifest import FileRecord
from fastvar.errors import BundleError
from tests.models.small_bundle import make_bundle, write_bundle


@pytest.fixture
def old(tmp_path: Path) -> tuple[Path, FileRecord]:
    """The weight file of a bundle, and what its manifest says of it."""
    record = make_bundle(tmp_path / "old").weights
    return tmp_path / "old" / record.file, record


@pytest.fixture
def writer(tmp_path: Path):
    with BundleWriter(tmp_path / "new") as writer:
        yield writer


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that knows none."""

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)


def test_it_is_the_same_file_where_the_file_system_can(old, writer):
    source, record = old
    assert writer.link_file(source, record) is True
    assert writer.path(record.file).samefile(source)


def test_a_symbolic_link_is_followed_to_its_file(tmp_path, old, writer):
    source, record = old
    (tmp_path / "link").symlink_to(source)
    assert writer.link_file(tmp_path / "link", record) is True
    assert not writer.path(record.file).is_symlink()
    assert writer.path(record.file).samefile(source)


def test_it_is_a_copy_elsewhere(old, writer, monkeypatch):
    source, record = old
    no_links(monkeypatch)
    assert writer.link_file(source, record) is False
    assert not writer.path(record.file).samefile(source)
    assert writer.path(record.file).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_that_was_changed_since_it_was_checked_is_noticed(old, writer, monkeypatch, linked):
    source, record = old
    if not linked:
        no_links(monkeypatch)
    source.write_bytes(bytes(record.size_bytes))
    with pytest.raises(BundleError, match="is damaged"):
        writer.link_file(source, record)


def test_large_files_are_linked_by_size_and_copied_by_digest(old, writer, monkeypatch):
    """Whoever copies reads all of it anyway."""
    source, record = old
    source.write_bytes(bytes(record.size_bytes))
    monkeypatch.setattr(bundle_module, "HASHED_WEIGHTS_BYTES", record.size_bytes - 1)
    assert writer.link_file(source, record) is True
    writer.path(record.file).unlink()
    no_links(monkeypatch)
    with pytest.raises(BundleError, match="is damaged"):
        writer.link_file(source, record)
    writer.path(record.file).unlink()
    monkeypatch.undo()
    source.write_bytes(b"short")
    monkeypatch.setattr(bundle_module, "HASHED_WEIGHTS_BYTES", record.size_bytes - 1)
    with pytest.raises(BundleError, match="it has 5 bytes"):
        writer.link_file(source, record)


def test_only_what_is_new_is_brought_to_the_disk(tmp_path, old, monkeypatch):
    """The other bundle's file is there already; a large one would take seconds."""
    source, record = old
    synced: list[str] = []
    sync = bundle_module.sync_file
    monkeypatch.setattr(bundle_module, "sync_file", lambda path: (synced.append(path.name), sync(path)))
    with BundleWriter(tmp_path / "new") as writer:
        manifest = write_bundle(writer)
        writer.path(record.file).unlink()
        writer.link_file(source, record)
        writer.commit(replace(manifest, weights=record))
    assert "weights.safetensors" not in synced
    assert {"manifest.json", "tokenizer.json"} <= set(synced)
    assert Bundle.open(tmp_path / "new", verify="all").manifest.weights == record
