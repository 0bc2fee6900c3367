import zlib
from pathlib import Path

import pytest
from PIL import Image, features

from fastvar.errors import InputError
from fastvar.runtime.images.files import save_image
from fastvar.runtime.images.formats import JPEG, PNG, WEBP, format_named, format_of, read_metadata

PICTURE = Image.effect_noise((64, 48), 60).convert("RGB")
TOLD = {
    "prompt": "ein roter Kreis über 日本 🙂\nzweite Zeile",
    "seed": "7",
    "settings": '{"tau": 0.5}',
    "fastvar": "1.2",
}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_metadata_survives_in_every_format(tmp_path: Path, name: str):
    path = save_image(PICTURE, tmp_path / name, TOLD)
    assert path.name == name
    assert read_metadata(path) == TOLD
    with Image.open(path) as image:
        assert image.format == format_of(path).pillow
        assert image.size == PICTURE.size


def test_other_programs_see_the_prompt_and_who_made_it(tmp_path: Path):
    for name in ("a.jpg", "a.webp"):
        with Image.open(save_image(PICTURE, tmp_path / name, TOLD)) as image:
            exif = image.getexif()
        assert exif[0x010E].encode("latin-1").decode() == TOLD["prompt"]  # Pillow gives the bytes of UTF-8
        assert exif[0x0131] == "fastvar 1.2"


def pixels(data: bytes, folder: Path) -> bytes:
    (folder / "pixels").write_bytes(data)
    with Image.open(folder / "pixels") as image:
        return image.convert("RGB").tobytes()


def test_quality(tmp_path: Path):
    for chosen in (JPEG, WEBP):
        sizes = [len(chosen.encode(PICTURE, {}, quality)) for quality in (1, 50, 100)]
        assert sizes == sorted(set(sizes))
        assert chosen.encode(PICTURE, {}) == chosen.encode(PICTURE, {}, chosen.quality)
    assert pixels(WEBP.encode(PICTURE, {}, 100), tmp_path) == PICTURE.tobytes()
    assert pixels(WEBP.encode(PICTURE, {}, 99), tmp_path) != PICTURE.tobytes()
    assert pixels(PNG.encode(PICTURE, {}), tmp_path) == PICTURE.tobytes()


def test_what_does_not_fit_is_the_users_error(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="png has no quality"):
        PNG.encode(PICTURE, {}, 90)
    for quality in (0, 101, -1):
        with pytest.raises(InputError, match="out of range"):
            JPEG.encode(PICTURE, {}, quality)
    long = {"prompt": "r" * 60_000}
    with pytest.raises(InputError, match="prompt and settings take 120"):
        JPEG.encode(PICTURE, long)
    assert len(WEBP.encode(PICTURE, long)) > 120_000
    fits = {"prompt": "", "settings": "s" * 65_400}
    assert len(JPEG.encode(PICTURE, fits)) > 65_400
    monkeypatch.setattr(features, "check", lambda _name: False)
    with pytest.raises(InputError, match="without WebP"):
        WEBP.encode(PICTURE, {})


def test_names_of_formats():
    assert [format_named(name) for name in ("png", "JPEG", "jpg", "webp")] == [PNG, JPEG, JPEG, WEBP]
    with pytest.raises(InputError, match="'gif' not understood"):
        format_named("gif")
    for name in ("a.gif", "a", "png"):
        with pytest.raises(InputError, match=r"expected: a \.png, \.jpg, \.jpeg or \.webp file"):
            format_of(Path(name))


def test_other_programs_files_tell_nothing(tmp_path: Path):
    exif = Image.Exif()
    for number, comment in enumerate((b"ASCII\0\0\0[1", b"ASCII\0\0\0[1]", b"UNICODE\0x", b"", b'ASCII\0\0\0{"a": 1}')):
        exif[0x8769] = {0x9286: comment}
        PICTURE.save(tmp_path / f"{number}.jpg", exif=exif)
        assert read_metadata(tmp_path / f"{number}.jpg") == {}
    PICTURE.save(tmp_path / "plain.webp")
    assert read_metadata(tmp_path / "plain.webp") == {}


def test_reading_something_else_is_the_users_error(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG but no more")
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff but no more")
    PICTURE.save(tmp_path / "a.gif")
    (tmp_path / "cut.webp").write_bytes(WEBP.encode(PICTURE, {})[:200])
    for name in ("a.png", "a.jpg", "a.gif", "cut.webp", "missing.png"):
        with pytest.raises(InputError, match="cannot be read"):
            read_metadata(tmp_path / name)


def test_a_png_whose_header_is_cut_is_refused_in_words(tmp_path):
    """Pillow raises ValueError of it, where other damage is an OSError or a SyntaxError."""
    path = tmp_path / "cut.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"\0\0\0\x09IHDR"
        + bytes(8)
        + b"\x08"
        + zlib.crc32(b"IHDR" + bytes(8) + b"\x08").to_bytes(4, "big")
    )
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata(path)
