"""Images that users give: every kind that Pillow reads, upright; what is no image is told plainly."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvar.errors import InputError
from fastvar.runtime.editing.source_image import (
    read_image,
    read_mask,
)
from tests.runtime.editing.pictures import RED, RIGHT_HALF, grey16, red, see_through


@pytest.mark.parametrize(
    ("image", "level", "tolerance"),
    [
        (red("RGB"), RED, 0),
        (red("CMYK"), RED, 2),
        (red("YCbCr"), RED, 2),
        (red("HSV"), RED, 3),
        (red("P"), RED, 0),
        (red("L"), (82, 82, 82), 1),
        (red("1"), None, 0),
        (grey16(), (130, 130, 130), 0),
        (Image.fromarray(np.full((4, 6), 130 * 257, np.int32)), (130, 130, 130), 0),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_every_mode_becomes_rgb(image: Image.Image, level: tuple[int, int, int] | None, tolerance: int):
    found = read_image(image)
    assert (found.mode, found.size) == ("RGB", (6, 4))
    if level is not None:
        np.testing.assert_allclose(np.asarray(found)[1, 1].astype(int), level, atol=tolerance)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparent_parts_lie_on_white_and_are_holes_to_fill(mode: str):
    image = see_through(mode)
    assert image.mode == mode
    assert read_image(image).getpixel((5, 1)) == (255, 255, 255)
    np.testing.assert_array_equal(read_mask(image), RIGHT_HALF)


def test_palette_with_a_transparent_colour(tmp_path: Path):
    image = red("P")
    image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_png_from_a_file(tmp_path: Path):
    grey16().save(tmp_path / "a.png")
    assert read_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (130, 130, 130)


def test_camera_orientation_is_undone(tmp_path: Path):
    image = Image.new("RGB", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (4, 6)
    assert read_mask(tmp_path / "a.jpg").shape == (6, 4)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()


BAD_FILES = {
    "zero bytes": b"",
    "text": b"a red circle",
    "truncated": png()[:900],
    "only a header": png()[:20],
    "damaged": png()[:200] + bytes(100) + png()[300:],
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_what_is_no_whole_image(tmp_path: Path, kind: str):
    (tmp_path / "a.png").write_bytes(BAD_FILES[kind])
    for read in (read_image, read_mask):
        with pytest.raises(InputError, match=r"a\.png cannot be read") as error:
            read(tmp_path / "a.png")
        assert error.value.fix


def test_missing_file_folder_and_what_is_no_path(tmp_path: Path):
    with pytest.raises(InputError, match=r"b\.png cannot be read: No such file"):
        read_image(tmp_path / "b.png")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_image(tmp_path)
    for wrong in (7, None, ["a.png"], object()):
        with pytest.raises(InputError, match=f"the mask is a {type(wrong).__name__}") as error:
            read_mask(wrong)
        assert "numpy array" in error.value.expected


def test_levels_without_a_known_range_are_refused():
    with pytest.raises(InputError, match="an image of mode 'F' cannot be used"):
        read_image(Image.new("F", (4, 4)))


def test_an_image_too_large_to_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="cannot be read: Image size"):
        read_image(tmp_path / "a.png")


def test_a_file_by_its_path_its_bytes_or_opened(tmp_path: Path):
    data = png()
    (tmp_path / "a.png").write_bytes(data)
    expected = read_image(tmp_path / "a.png").tobytes()
    for source in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        assert read_image(source).tobytes() == expected
    with (tmp_path / "a.png").open("rb") as file:
        assert [read_image(file).tobytes() for _ in range(2)] == [expected] * 2, "from its beginning"
    with pytest.raises(InputError, match="the image cannot be read"):
        read_image(file)
    with (tmp_path / "a.png").open() as file, pytest.raises(InputError, match="opened as text") as error:
        read_image(file)
    assert "rb" in error.value.fix
    with pytest.raises(InputError, match="the image cannot be read: no kind of image file that is read"):
        read_image(b"no image")


def test_given_images_stay_as_they_are():
    image = see_through("RGBA")
    before = image.tobytes(), dict(image.info)
    read_image(image), read_mask(image)
    assert (image.tobytes(), dict(image.info)) == before


def test_no_pixels():
    with pytest.raises(InputError, match="the image is 0x4"):
        read_image(Image.new("RGB", (0, 4)))


# Levels of other widths


def grey(levels: object, dtype: type) -> Image.Image:
    return Image.fromarray(np.array([levels] * 2, dtype))


def test_wide_integers_are_of_8_bits_where_no_level_is_above():
    for dtype in (np.int32, np.int64, np.uint32):
        array = np.array([[0, 200, 255]] * 2, dtype)
        assert [read_image(array).getpixel((x, 0))[0] for x in range(3)] == [0, 200, 255]
        np.testing.assert_array_equal(read_mask(array)[0], [False, True, True])
    assert read_image(grey([0, 200, 255], np.int32)).getpixel((1, 0)) == (200, 200, 200)
    assert read_image(grey([0, 200 * 257], np.int32)).getpixel((1, 0)) == (200, 200, 200)
    np.testing.assert_array_equal(read_mask(grey([0, 200 * 257], np.uint16))[0], [False, True])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (grey([0, 200], np.uint16), "all but black: its brightest level is 200 of 65535"),
        (np.array([[0, 200]], np.uint16), "all but black: its brightest level is 200 of 65535"),
        (grey([0, 1], np.uint8), "all but black: its brightest level is 1 of 255"),
        (np.array([[[0, 1, 1]]], np.uint8), "all but black: its brightest level is 1 of 255"),
        (grey([-1, 200], np.int32), "levels from -1 to 200"),
        (grey([0, 65536], np.int32), "levels from 0 to 65536"),
        (np.array([[-5, 5]]), "levels from -5 to 5"),
    ],
)
def test_levels_that_would_come_out_black_are_refused(given: object, named: str):
    with pytest.raises(InputError, match=named) as error:
        read_image(given)
    assert error.value.expected


def test_black_is_black():
    for black in (*(np.zeros((2, 2), dtype) for dtype in (np.uint8, np.uint16)), Image.new("I", (2, 2))):
        assert read_image(black).getpixel((0, 0)) == (0, 0, 0)


def stored(bits: int, kind: int, row: bytes, transparent: bytes = b"", width: int = 4) -> bytes:
    """A PNG file of two equal rows, with levels of any width: kind 0 is grey, 2 colour, 4 grey with alpha."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 2, bits, kind, 0, 0, 0))
    trns = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + trns + chunk(b"IDAT", zlib.compress((b"\0" + row) * 2)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("file", "levels"),
    [
        (stored(16, 0, struct.pack(">4H", 0, 40000, 25700, 65535)), [0, 156, 100, 255]),
        (stored(16, 0, struct.pack(">4H", 0, 40000, 25700, 65535), struct.pack(">H", 25700)), [0, 156, None, 255]),
        (stored(16, 4, struct.pack(">8H", 0, 65535, 40000, 65535, 25700, 0, 65535, 65535)), [0, 156, None, 255]),
        (stored(8, 0, bytes([0, 156, 100, 255]), struct.pack(">H", 100)), [0, 156, None, 255]),
        (stored(4, 0, bytes([0x07, 0x2F]), struct.pack(">H", 2)), [0, 119, None, 255]),
        (stored(2, 0, bytes([0b00011011]), struct.pack(">H", 2)), [0, 85, None, 255]),
        (stored(1, 0, bytes([0b01010000]), struct.pack(">H", 0)), [None, 255, None, 255]),
    ],
    ids=["16", "16 transparent", "16 alpha", "8 transparent", "4 transparent", "2 transparent", "1 transparent"],
)
def test_grey_files_of_any_width_look_as_they_do(file: bytes, levels: list[int | None]):
    """None is transparent: it lies on white."""
    for source in (file, Image.open(io.BytesIO(file))):
        found = np.asarray(read_image(source))[0, :, 0].astype(int)
        np.testing.assert_allclose(found, [255 if level is None else level for level in levels], atol=1)
    holes = [level is None for level in levels]
    if any(holes) and levels[0] is not None:
        np.testing.assert_array_equal(read_mask(file)[0], holes)


def test_a_transparent_colour_of_16_bits_is_refused():
    row = struct.pack(">12H", *[0] * 3, *[40000] * 3, *[100] * 3, *[65535] * 3)
    file = stored(16, 2, row, struct.pack(">3H", 40000, 40000, 40000))
    loaded = Image.open(io.BytesIO(file))
    loaded.load()
    for source in (file, loaded):
        with pytest.raises(InputError, match="one colour of 16 bits is transparent"):
            read_image(source)


# Arrays


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)])
def test_arrays_of_every_shape(shape: tuple[int, ...]):
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if shape[-1] == 4:
        values[..., 3] = 255
    for array in (values, np.asfortranarray(values), values / 255, (values / 255).astype(np.float32)):
        found = np.asarray(read_image(array))
        assert found.shape == (4, 6, 3)
        np.testing.assert_array_equal(found[..., 0], values if values.ndim == 2 else values[..., 0])


@pytest.mark.parametrize(
    ("array", "named", "fix"),
    [
        (np.zeros((3, 4, 6), np.uint8), r"shape \[3, 4, 6\]", "transpose"),
        (np.zeros((1, 4, 6, 3), np.uint8), r"shape \[1, 4, 6, 3\]", "single"),
        (np.zeros((4, 6, 2), np.uint8), r"shape \[4, 6, 2\]", ""),
        (np.zeros(4, np.uint8), r"shape \[4\]", ""),
        (np.zeros((0, 4), np.uint8), r"shape \[0, 4\]", ""),
        (np.full((4, 6), np.nan), "NaN", ""),
        (np.full((4, 6), np.inf), "NaN or infinity", ""),
        (np.full((4, 6), 200.0), "float64 from 200 to 200", "astype"),
        (np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6), "float32 from -1 to 1", r"\(array \+ 1\) / 2"),
        (np.full((4, 6), 1j), "complex128", ""),
        (np.full((4, 6), "a"), "<U1", ""),
        (np.full((4, 6), None), "object", ""),
    ],
)
def test_arrays_that_could_mean_anything(array: np.ndarray, named: str, fix: str):
    for read in (read_image, read_mask):
        with pytest.raises(InputError, match=named) as error:
            read(array)
        assert error.value.expected
        assert re.search(fix, error.value.fix)
