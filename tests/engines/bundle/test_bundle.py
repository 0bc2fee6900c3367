"""A bundle is opened as a whole or not at all: every file is checked, and held from then on."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastvar.engines.bundle import bundle as bundle_module
from fastvar.engines.bundle.bundle import MANIFEST, Bundle, Opening, is_bundle
from fastvar.engines.bundle.manifest import FORMAT_VERSION, FileRecord
from fastvar.engines.bundle.weight_file import WeightFile
from fastvar.errors import BundleError
from tests.models.small_bundle import make_bundle


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def engine_file(path: Path) -> Path:
    return next((path / "engines").iterdir())


def test_round_trip(tmp_path):
    manifest = make_bundle(tmp_path / "b")
    opened = Bundle.open(tmp_path / "b", verify="all")
    assert opened.manifest == manifest
    assert opened.digest == hashlib.sha256((tmp_path / "b" / MANIFEST).read_bytes()).hexdigest()
    assert opened.read_engine(manifest.engines["linear"]) == b"engine"
    np.testing.assert_array_equal(WeightFile(opened.path / manifest.weights.file)["layer.0.w"], np.ones((4, 4)))
    assert names(tmp_path) == ["b"]
    assert names(tmp_path / "b") == ["engines", MANIFEST, "tokenizer.json", "weights.safetensors"]


def test_equal_builds_have_equal_digests_and_others_do_not(tmp_path):
    for name, engine in (("a", b"engine"), ("b", b"engine"), ("c", b"other")):
        make_bundle(tmp_path / name, engine)
    digest = {name: Bundle.open(tmp_path / name).digest for name in "abc"}
    assert digest["a"] == digest["b"] != digest["c"]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("find", [engine_file, lambda p: p / "weights.safetensors", lambda p: p / "tokenizer.json"])
def test_a_flipped_byte(tmp_path, find):
    make_bundle(tmp_path / "b")
    file = find(tmp_path / "b")
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    _flip(file)
    wrong = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(BundleError, match=f"{file.name} is damaged: its sha256 is {wrong}") as caught:
        Bundle.open(tmp_path / "b")
    assert caught.value.expected == f"sha256 {right}"
    assert "rebuild" in caught.value.fix


def test_a_byte_flipped_after_opening_changes_nothing(tmp_path):
    make_bundle(tmp_path / "b")
    opened = Bundle.open(tmp_path / "b")
    _flip(engine_file(tmp_path / "b"))
    assert opened.read_engine(opened.manifest.engines["linear"]) == b"engine"
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.open(tmp_path / "b")


def test_large_weights_are_hashed_only_on_request(tmp_path, monkeypatch):
    make_bundle(tmp_path / "b")
    monkeypatch.setattr(bundle_module, "HASHED_WEIGHTS_BYTES", 16)
    _flip(tmp_path / "b" / "weights.safetensors")
    Bundle.open(tmp_path / "b")
    with pytest.raises(BundleError, match=r"weights\.safetensors is damaged"):
        Bundle.open(tmp_path / "b", verify="all")
    os.truncate(tmp_path / "b" / "weights.safetensors", 100)
    with pytest.raises(BundleError, match="it has 100 bytes"):
        Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("find", [engine_file, lambda p: p / "weights.safetensors", lambda p: p / MANIFEST])
def test_a_missing_file(tmp_path, find):
    make_bundle(tmp_path / "b")
    find(tmp_path / "b").unlink()
    with pytest.raises(BundleError, match=r"cannot read|cannot be read") as caught:
        Bundle.open(tmp_path / "b")
    assert caught.value.fix


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest(tmp_path, text):
    make_bundle(tmp_path / "b")
    (tmp_path / "b" / MANIFEST).write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(tmp_path / "b")


def _edit(path: Path, change) -> None:
    data = json.loads((path / MANIFEST).read_text())
    change(data)
    (path / MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize("version", [FORMAT_VERSION - 2, FORMAT_VERSION + 1])
def test_other_format_versions(tmp_path, version):
    make_bundle(tmp_path / "b")
    _edit(tmp_path / "b", lambda data: data.update(format_version=version))
    with pytest.raises(BundleError, match=f"format version {version}"):
        Bundle.open(tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(engines=[]),
        lambda data: data.update(plan=3),
        lambda data: data["plan"]["schedule"].update(sizes=[]),
        lambda data: data["transformer"].update(width=63),
        lambda data: data["plan"].update(depth=1),
        lambda data: data["weights"].update(size_bytes="many"),
        lambda data: data["weights"].update(file=["weights"]),
        lambda data: data.update(surprise=1),
    ],
)
def test_a_manifest_of_wrong_types_or_impossible_sizes(tmp_path, change):
    make_bundle(tmp_path / "b")
    _edit(tmp_path / "b", change)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "b")


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "engines/../../secret", "c:secret", "a\0b", "..\\secret"])
def test_a_manifest_must_not_lead_outside_its_bundle(tmp_path, file):
    make_bundle(tmp_path / "b")
    (tmp_path / "secret").write_bytes(b"engine")
    _edit(tmp_path / "b", lambda data: data["engines"]["linear"].update(file=file))
    with pytest.raises(BundleError, match="expected: a file inside the bundle"):
        Bundle.open(tmp_path / "b")
    opened = dataclasses.replace(make_bundle(tmp_path / "c").engines["linear"], file=file)
    with pytest.raises(BundleError, match="expected: a file inside the bundle"):
        Bundle.open(tmp_path / "c").read_engine(opened)


def test_weights_up_to_256_mib_are_hashed_without_asking():
    """As `Bundle.open` says."""
    assert Opening().hashes(FileRecord("weights.safetensors", "", 268_435_456))
    assert not Opening().hashes(FileRecord("weights.safetensors", "", 268_435_457))
    assert Opening("all").hashes(FileRecord("weights.safetensors", "", 268_435_457))


def replace_once(monkeypatch, folder, *engine):
    """Have another bundle take the place of a folder when the first of its files is read."""
    read, times = bundle_module.read_checked, []

    def replaced_once(path, record):
        if not times:
            times.append(record)
            make_bundle(folder, *engine)
        return read(path, record)

    monkeypatch.setattr(bundle_module, "read_checked", replaced_once)


def test_a_bundle_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """By an equal one, so that no digest tells: files of two builds are not mixed even then."""
    make_bundle(tmp_path / "b")
    replace_once(monkeypatch, tmp_path / "b")
    slept: list[float] = []
    monkeypatch.setattr(bundle_module.time, "sleep", slept.append)
    assert Bundle.open(tmp_path / "b").is_current()
    assert slept == [0.2], "a swap takes less"


def test_a_bundle_whose_files_go_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """The new one has other files; where none has taken the place, the error stands."""
    make_bundle(tmp_path / "b")
    replace_once(monkeypatch, tmp_path / "b", b"new")
    monkeypatch.setattr(bundle_module, "_SWAP_SECONDS", 0)
    opened = Bundle.open(tmp_path / "b")
    assert opened.read_engine(opened.manifest.engines["linear"]) == b"new"
    engine_file(tmp_path / "b").unlink()
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path / "b")


def test_shown_it_is_told_by_its_place_and_digest_and_not_by_its_content(tmp_path):
    make_bundle(tmp_path / "b")
    opened = Bundle.open(tmp_path / "b")
    shown = repr(opened)
    assert str(tmp_path / "b") in shown
    assert opened.digest in shown
    for hidden in ("b'engine'", "_stamp", "text=b", "weights=<"):
        assert hidden not in shown


def test_a_bundle_that_is_replaced_again_and_again_is_given_up(tmp_path, monkeypatch):
    make_bundle(tmp_path / "b")
    read = bundle_module.read_checked

    def replaced(path, record):
        make_bundle(tmp_path / "b")
        return read(path, record)

    monkeypatch.setattr(bundle_module, "read_checked", replaced)
    monkeypatch.setattr(bundle_module, "_SWAP_SECONDS", 0)
    with pytest.raises(BundleError, match="is replaced again and again while it is read"):
        Bundle.open(tmp_path / "b")


def test_what_is_taken_for_a_bundle(tmp_path):
    make_bundle(tmp_path / "b")
    assert is_bundle(tmp_path / "b")
    assert not is_bundle(tmp_path)
    assert not is_bundle(tmp_path / "b" / MANIFEST)


def test_unknown_way_to_verify(tmp_path):
    with pytest.raises(BundleError, match="one of auto, all"):
        Bundle.open(tmp_path, verify="none")
