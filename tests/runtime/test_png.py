import os
from pathlib import Path

import pytest
from PIL import Image

from fastvar.errors import InputError
from fastvar.runtime.png import check_writable, free_path, read_metadata, save_png, slug

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


def test_unwritable_place_is_the_users_error(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        save_png(PICTURE, tmp_path / "file" / "a.png", {})
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / "file" / "deeper")


def test_failed_write_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.png").write_bytes(b"precious")

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(InputError, match="No space left"):
        save_png(PICTURE, tmp_path / "a.png", {})
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"precious"


def test_reading_something_else_is_the_users_error(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG but no more")
    for name in ("a.png", "missing.png"):
        with pytest.raises(InputError, match="cannot be read"):
            read_metadata(tmp_path / name)


def test_check_writable_leaves_no_trace(tmp_path: Path):
    check_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == []


def test_save_makes_the_folder(tmp_path: Path):
    save_png(PICTURE, tmp_path / "new" / "folder" / "a.png", {})
    assert os.listdir(tmp_path / "new" / "folder") == ["a.png"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red circle, above a blue square!", "a-red-circle-above-a-blue-square"),
        ("../../etc/passwd", "etc-passwd"),
        ("🙂🙂", "image"),
        ("x" * 100, "x" * 60),
    ],
)
def test_slug(prompt: str, name: str):
    assert slug(prompt) == name


def test_free_path_never_names_an_existing_file(tmp_path: Path):
    wanted = tmp_path / "a-7.png"
    assert free_path(wanted) == wanted
    wanted.touch()
    assert free_path(wanted).name == "a-7-2.png"
    (tmp_path / "a-7-2.png").symlink_to("nowhere")
    assert free_path(wanted).name == "a-7-3.png"
