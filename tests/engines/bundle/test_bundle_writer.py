"""A bundle is written as a whole or not at all, by one process at a time, whatever goes wrong."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.engines.bundle import bundle as bundle_module
from fastvar.engines.bundle.bundle import MANIFEST, Bundle, BundleWriter
from fastvar.engines.bundle.folder import JOURNAL
from fastvar.engines.bundle.weight_file import WeightFile
from fastvar.engines.cache.lock import FolderLock
from fastvar.errors import BundleError, InternalError
from tests.models.small_bundle import ROOT, make_bundle, write_bundle


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_an_engine_is_named_for_people_and_by_its_content(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        file, digest, _ = writer.add_engine("block/9 dense", b"same", ".onnx")
    assert file == f"engines/block-9-dense-{digest[:8]}.onnx"


def test_equal_engines_are_stored_once(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        first = writer.add_engine("block/9 dense", b"same", ".onnx")
        assert writer.add_engine("block 12", b"same", ".onnx") == first
        assert writer.add_engine("block 12", b"other", ".onnx")[0] != first[0]
        assert len(names(writer.path("engines"))) == 2
    assert first[1:] == (hashlib.sha256(b"same").hexdigest(), 4)


def test_a_new_bundle_replaces_the_old(tmp_path):
    make_bundle(tmp_path / "b", value=1)
    old = WeightFile(tmp_path / "b" / "weights.safetensors")
    make_bundle(tmp_path / "b", value=2)
    assert WeightFile(tmp_path / "b" / "weights.safetensors")["layer.0.w"][0, 0] == 2
    assert old["layer.0.w"][0, 0] == 1  # who had it open keeps what it had
    assert names(tmp_path) == ["b"]


def test_through_a_symbolic_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make_bundle(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    Bundle.open(tmp_path / "real")


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_bundle_and_no_trace(tmp_path, failure):
    make_bundle(tmp_path / "b")
    before = Bundle.open(tmp_path / "b").digest

    def interrupted() -> None:
        with BundleWriter(tmp_path / "b") as writer:
            write_bundle(writer, b"new")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert Bundle.open(tmp_path / "b", verify="all").digest == before
    assert names(tmp_path) == ["b"]


def test_leaving_without_commit_builds_nothing(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        write_bundle(writer)
    assert names(tmp_path) == []


def test_folders_on_the_way_are_made(tmp_path):
    make_bundle(tmp_path / "some" / "where" / "b")
    make_bundle(tmp_path / "some" / "where" / "c")
    assert names(tmp_path / "some" / "where") == ["b", "c"]


def test_what_may_not_be_replaced_is_refused_before_anything_is_built(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(BundleError, match="is not a bundle"):
        BundleWriter(tmp_path / "b").__enter__()
    assert names(tmp_path) == ["b"], "the lock is given back, and no folder is left"


def test_everything_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    """And the trade of places behind it."""
    synced: list[tuple[str, bool]] = []
    for function in ("sync_file", "sync_folder"):
        real = getattr(bundle_module, function)

        def noted(path, real=real):
            synced.append((path.name, (tmp_path / "b").exists()))
            real(path)

        monkeypatch.setattr(bundle_module, function, noted)
    with BundleWriter(tmp_path / "b") as writer:
        manifest = write_bundle(writer)
        building = writer.path(MANIFEST).parent.name
        writer.commit(manifest)
    assert synced[-1] == (tmp_path.name, True)
    before = {name for name, placed in synced[:-1] if not placed}
    engine = Path(manifest.engines["linear"].file).name
    assert before >= {building, "engines", engine, "weights.safetensors", "tokenizer.json", MANIFEST}
    assert len(before) == len({name for name, _ in synced[:-1]})


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        make_bundle(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        make_bundle(tmp_path / "thesis.tex")
    assert names(tmp_path) == ["thesis.tex"]
    with pytest.raises(BundleError, match="a folder with a name"):
        BundleWriter("/")


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"cannot write .*file"):
        make_bundle(tmp_path / "file" / "b")


def test_a_full_disk(tmp_path, monkeypatch):
    make_bundle(tmp_path / "b")

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(bundle_module, "write_whole", full)
    with pytest.raises(BundleError, match="No space left on device"):
        make_bundle(tmp_path / "b", b"new")
    monkeypatch.undo()
    assert Bundle.open(tmp_path / "b").manifest.engines["linear"].size_bytes == len(b"engine")
    assert names(tmp_path) == ["b"]


def test_a_swap_that_fails_brings_the_old_bundle_back(tmp_path, monkeypatch):
    """Where folders cannot trade places in one step, they are renamed one after the other."""
    make_bundle(tmp_path / "b")
    monkeypatch.setattr(bundle_module, "exchange", lambda first, second: False)
    rename = Path.rename

    def refuse(path, target):
        if ".building-" in path.name:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(BundleError, match="Permission denied"):
        make_bundle(tmp_path / "b", b"new")
    monkeypatch.undo()
    assert Bundle.open(tmp_path / "b").manifest.engines["linear"].size_bytes == len(b"engine")
    assert names(tmp_path) == ["b"]


def test_the_old_bundle_goes_where_folders_cannot_trade_places(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_module, "exchange", lambda first, second: False)
    make_bundle(tmp_path / "b")
    renamed = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (renamed.append(target.name), rename(path, target))[1])
    make_bundle(tmp_path / "b", b"new")
    assert names(tmp_path) == ["b"]
    assert Bundle.open(tmp_path / "b").manifest.engines["linear"].size_bytes == len(b"new")
    assert renamed == [f".b.replaced-{os.getpid()}", "b"], "by that name the next build finds it, were this one killed"


def test_a_manifest_that_names_an_unwritten_file_is_a_bug(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        manifest = write_bundle(writer)
        writer.path("weights.safetensors").unlink()
        with pytest.raises(InternalError, match=r"weights\.safetensors"):
            writer.commit(manifest)


def test_only_one_builder_at_a_time(tmp_path):
    with BundleWriter(tmp_path / "b"):
        with pytest.raises(BundleError, match=r"another build into .* is running"):
            make_bundle(tmp_path / "b")
        make_bundle(tmp_path / "c")
    make_bundle(tmp_path / "b")


_BUILDER = """
import sys
from pathlib import Path
from fastvar.engines.bundle.bundle import BundleWriter
from tests.models.small_bundle import write_bundle
with BundleWriter(Path(sys.argv[1])) as writer:
    manifest = write_bundle(writer, b"from the other process")
    print("written", flush=True)
    sys.stdin.read()
    writer.commit(manifest)
"""


def _start_builder(out: Path) -> "subprocess.Popen[str]":
    builder = subprocess.Popen(
        [sys.executable, "-c", _BUILDER, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert builder.stdout is not None
    assert builder.stdout.readline() == "written\n"
    return builder


def test_two_processes_building_into_one_folder(tmp_path):
    with _start_builder(tmp_path / "b") as other:
        with pytest.raises(BundleError, match=r"another build into .* is running"):
            make_bundle(tmp_path / "b")
        other.communicate("go")
    assert other.returncode == 0
    opened = Bundle.open(tmp_path / "b", verify="all")
    assert opened.read_engine(opened.manifest.engines["linear"]) == b"from the other process"
    assert names(tmp_path) == ["b"]


def test_after_a_killed_builder_the_old_bundle_stands_and_the_next_build_runs(tmp_path):
    make_bundle(tmp_path / "b")
    with _start_builder(tmp_path / "b") as other:
        other.send_signal(signal.SIGKILL)
    assert len(names(tmp_path)) == 3  # the bundle, a half-built one, a lock file
    opened = Bundle.open(tmp_path / "b", verify="all")
    assert opened.read_engine(opened.manifest.engines["linear"]) == b"engine"
    make_bundle(tmp_path / "b", b"new")
    assert names(tmp_path) == ["b"]


def test_killed_between_the_two_renames(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / ".b.replaced-123")
    (tmp_path / ".b.building-123").mkdir()
    (tmp_path / ".b.building-mine").mkdir()  # not ours to clear
    with BundleWriter(tmp_path / "b"):
        Bundle.open(tmp_path / "b")
    assert names(tmp_path) == [".b.building-mine", "b"]


def test_of_several_builds_killed_between_the_two_renames_the_last_is_restored(tmp_path):
    for number, engine in ((123, b"older"), (124, b"newer")):
        make_bundle(tmp_path / "b", engine)
        (tmp_path / "b").rename(tmp_path / f".b.replaced-{number}")
    with BundleWriter(tmp_path / "b"):
        opened = Bundle.open(tmp_path / "b")
        assert opened.read_engine(opened.manifest.engines["linear"]) == b"newer"
    assert names(tmp_path) == ["b"]


def test_a_lock_file_removed_while_waiting_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    lock, real = FolderLock(tmp_path / "b"), FolderLock._lock
    seen = []

    def removed_once(self, handle, wait):
        if not seen:
            self._path.unlink()
        seen.append(handle)
        real(self, handle, wait)

    monkeypatch.setattr(FolderLock, "_lock", removed_once)
    lock.acquire()
    assert len(seen) == 2
    assert (tmp_path / "b.lock").exists()
    lock.release()
    lock.release()
    assert names(tmp_path) == []


def test_names_are_noted_once_before_their_files_are_written(tmp_path):
    with BundleWriter(tmp_path / "b") as writer:
        for _ in range(3):
            writer.path("weights.safetensors")
        writer.path("tokenizer.json")
        (journal,) = tmp_path.glob(f".b.building-*/{JOURNAL}")
        assert journal.read_text() == "weights.safetensors\ntokenizer.json\n"
