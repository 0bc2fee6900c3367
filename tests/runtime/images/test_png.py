import os
from pathlib import Path

import pytest
from PIL import Image

from fastvar.errors import InputError
from fastvar.runtime.images.png import check_writable, free_path, read_metadata, save_png, slug

PICTURE = Image.new("RGB", (8, 6), (200, 30, 40))


def test_metadata_and_pixels_survive(tmp_path: Path):
    told = {"prompt": "ein roter Kreis über 日本 🙂\nzweite Zeile", "seed": "7", "settings": '{"tau": 0.5}'}
    save_png(PICTURE, tmp_path / "a.png", told)
    assert read_metadata(tmp_path / "a.png") == told
    with Image.open(tmp_path / "a.png") as image:
        assert image.tobytes() == PICTURE.tobytes()
    assert os.listdir(tmp_path) == ["a.png"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path):
    (tmp_path / "plain").touch()
    save_png(PICTURE, tmp_path / "a.png", {})
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_name_that_was_free_a_moment_ago_is_not_overwritten(tmp_path: Path):
    first, second = (free_path(tmp_path / f"{slug('A circle')}-1.png") for _ in range(2))
    assert first == second
    written = [save_png(PICTURE, path, {"by": path.name}) for path in (first, second)]
    assert [path.name for path in written] == ["a-circle-1.png", "a-circle-1-2.png"]
    assert all(path.is_file() for path in written)


def test_another_suffix_is_the_users_error(tmp_path: Path):
    with pytest.raises(InputError, match=r"a \.png file"):
        save_png(PICTURE, tmp_path / "a.jpg", {})


def test_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").write_bytes(b"precious")

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_png(PICTURE, tmp_path / "a.png", {})
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"precious"


def test_save_makes_the_folder(tmp_path: Path):
    save_png(PICTURE, tmp_path / "new" / "folder" / "a.png", {})
    assert os.listdir(tmp_path / "new" / "folder") == ["a.png"]


def test_unwritable_place_is_the_users_error(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        save_png(PICTURE, tmp_path / "file" / "a.png", {})
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / "file" / "deeper")
