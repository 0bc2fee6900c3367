"""A bundle is known by its content, and nothing is removed that fastvar did not write."""

import json
import logging
from pathlib import Path

import pytest

from fastvar.engines.bundle import bundle as bundle_module
from fastvar.engines.bundle.bundle import Bundle, BundleWriter
from fastvar.engines.bundle.folder import JOURNAL, foreign_files, remove_written, written_files
from fastvar.errors import BundleError
from tests.models.small_bundle import make_bundle, write_bundle


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def refused(out: Path, *named: str) -> None:
    before = contents(out)
    with pytest.raises(BundleError) as caught:
        make_bundle(out, b"new")
    assert all(name in caught.value.problem for name in named)
    assert caught.value.fix
    assert contents(out) == before


WEB_APP = {"name": "my app", "start_url": "/"}


@pytest.mark.parametrize(
    "manifest",
    [
        WEB_APP,
        WEB_APP | {"format_version": 4},
        {"format_version": 4, "fastvar_version": "0.1.0"},
        {"format_version": "4", "fastvar_version": "0.1.0", "engines": {}, "weights": {"file": "w"}},
        [],
        "text",
    ],
)
def test_a_folder_with_another_programs_manifest(tmp_path, manifest):
    app = tmp_path / "app"
    app.mkdir()
    (app / "manifest.json").write_text(json.dumps(manifest))
    refused(app, "manifest.json", "is not a bundle")
    (app / "index.html").write_text("mine")
    refused(app, "index.html", "is not a bundle")


@pytest.mark.parametrize("file", ["circle.png", "engines/circle.png", "kernels/circle.png", "images/circle.png"])
def test_images_saved_inside_a_bundle(tmp_path, file):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / file).parent.mkdir(exist_ok=True)
    (tmp_path / "b" / file).write_bytes(b"an image")
    refused(tmp_path / "b", "images/" if file.startswith("images/") else file)


def test_a_link_to_a_folder_in_the_place_of_engines_is_foreign(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / "engines").rename(tmp_path / "elsewhere")
    (tmp_path / "b" / "engines").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "b", "engines")
    assert contents(tmp_path / "elsewhere")


def test_what_fastvar_writes_beside_the_manifests_files_goes_with_the_bundle(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / "kernels").mkdir()
    for file in ("kernels/rtx-1.7-sm86.kernels", "kernels/rtx-1.7-sm86.kernels.lock", "manifest.sig", ".writing-12ab"):
        (tmp_path / "b" / file).write_bytes(b"ours")
    make_bundle(tmp_path / "b", b"new")
    assert not (tmp_path / "b" / "manifest.sig").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_a_bundle_of_an_older_format_is_replaced(tmp_path):
    """Fields had other names; a file has always come with its digest."""
    old = tmp_path / "b"
    (old / "engines").mkdir(parents=True)
    for file in ("weights.safetensors", "tokenizer.json", "engines/step-0.onnx"):
        (old / file).write_bytes(b"old")
    record = {"sha256": "0" * 64, "size_bytes": 3}
    manifest = {
        "format_version": 1,
        "fastvar_version": "0.0.1",
        "engines": [{"file": "engines/step-0.onnx", **record}],
        "weights": {"file": "weights.safetensors", **record},
        "tokenizer": {"file": "tokenizer.json", **record},
    }
    (old / "manifest.json").write_text(json.dumps(manifest))
    make_bundle(old)
    Bundle.open(old)


def test_a_manifest_does_not_make_files_outside_its_bundle_ours(tmp_path):
    make_bundle(tmp_path / "b")
    path = tmp_path / "b" / "manifest.json"
    data = json.loads(path.read_text())
    data["text_tokenizer"]["file"] = "../thesis.tex"
    path.write_text(json.dumps(data))
    assert not any("thesis" in name for name in written_files(tmp_path / "b") or ())
    refused(tmp_path / "b", "tokenizer.json")


def test_a_file_that_comes_while_a_bundle_is_built_is_noticed_before_the_swap(tmp_path):
    make_bundle(tmp_path / "b")
    with BundleWriter(tmp_path / "b") as writer:
        manifest = write_bundle(writer, b"new")
        (tmp_path / "b" / "circle.png").write_bytes(b"an image")
        with pytest.raises(BundleError, match=r"circle\.png"):
            writer.commit(manifest)
    assert (tmp_path / "b" / "circle.png").read_bytes() == b"an image"
    opened = Bundle.open(tmp_path / "b")
    assert opened.read_engine(opened.manifest.engines["linear"]) == b"engine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


def test_a_file_that_comes_between_check_and_swap_is_kept_elsewhere(tmp_path, monkeypatch, caplog):
    make_bundle(tmp_path / "b")
    check = bundle_module.check_replaceable

    def late(out):
        check(out)
        if "written" in seen:
            (out / "circle.png").write_bytes(b"an image")

    seen: list[str] = []
    monkeypatch.setattr(bundle_module, "check_replaceable", late)
    with BundleWriter(tmp_path / "b") as writer, caplog.at_level(logging.WARNING):
        manifest = write_bundle(writer, b"new")
        seen.append("written")
        writer.commit(manifest)
    assert contents(tmp_path / "b.kept") == {"circle.png": b"an image"}
    assert str(tmp_path / "b.kept") in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "b.kept"]
    monkeypatch.undo()
    make_bundle(tmp_path / "b")
    assert contents(tmp_path / "b.kept") == {"circle.png": b"an image"}


def test_leavings_of_a_killed_build_go_and_what_others_put_there_stays(tmp_path, caplog):
    make_bundle(tmp_path / "b")
    writer = BundleWriter(tmp_path / "b").__enter__()
    write_bundle(writer)
    writer._lock.release()  # as if it had been killed
    left = next(tmp_path.glob(".b.building-*")).rename(tmp_path / ".b.building-1")
    assert (left / JOURNAL).is_file()
    (left / "notes.txt").write_text("mine")
    (tmp_path / ".b.replaced-1").mkdir()
    (tmp_path / ".b.replaced-1" / "mine.png").write_bytes(b"an image")
    make_bundle(tmp_path / "b")
    kept = {file: data for folder in tmp_path.glob("b.kept*") for file, data in contents(folder).items()}
    assert kept == {"notes.txt": b"mine", "mine.png": b"an image"}
    assert not list(tmp_path.glob(".b.*"))


def test_what_is_left_of_a_replaced_bundle_is_not_restored_as_one(tmp_path):
    (tmp_path / ".b.replaced-1").mkdir()
    (tmp_path / ".b.replaced-1" / "mine.png").write_bytes(b"an image")
    with BundleWriter(tmp_path / "b"):
        assert not (tmp_path / "b").exists()
    assert contents(tmp_path / "b.kept") == {"mine.png": b"an image"}


def test_removing_touches_nothing_else(tmp_path):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / "engines" / "mine").mkdir()
    (tmp_path / "b" / "engines" / "mine" / "deep.txt").write_text("mine")
    ours = written_files(tmp_path / "b")
    assert ours is not None
    assert foreign_files(tmp_path / "b", ours) == ["engines/mine/"]
    assert remove_written(tmp_path / "b", ours) == ["engines/mine/"]
    assert contents(tmp_path / "b") == {"engines/mine/deep.txt": b"mine"}
