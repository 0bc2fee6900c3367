"""Images that users give: every kind that Pillow reads, upright; what is no image, or does not fit, is told plainly."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvar.errors import InputError
from fastvar.runtime.source_image import (
    aspect_box,
    box_to_use,
    check_same_aspect,
    read_image,
    read_mask,
    same_part,
    touched,
)

RED = (200, 30, 40)


def red(mode: str) -> Image.Image:
    return Image.new("RGB", (6, 4), RED).convert(mode, palette=Image.Palette.ADAPTIVE)


def grey16() -> Image.Image:
    return Image.fromarray(np.full((4, 6), 130 * 257, np.uint16))


def see_through(mode: str) -> Image.Image:
    """Its right half is transparent."""
    image = Image.new("RGBA", (6, 4), (*RED, 255))
    image.paste((0, 0, 0, 0), (3, 0, 6, 4))
    if mode != "PA":
        return image.convert(mode)
    palette = red("P")
    palette.putalpha(image.getchannel("A"))
    return palette


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
def test_transparent_parts_lie_on_white_and_are_no_mask(mode: str):
    image = see_through(mode)
    assert image.mode == mode
    assert read_image(image).getpixel((5, 1)) == (255, 255, 255)
    assert not read_mask(image)[:, 3:].any()


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
    with pytest.raises(InputError, match="the image is a bytes"):
        read_image(png())  # type: ignore[arg-type]


def test_levels_without_a_known_range_are_refused():
    with pytest.raises(InputError, match="an image of mode 'F' cannot be used"):
        read_image(Image.new("F", (4, 4)))


def test_an_image_too_large_to_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="cannot be read: Image size"):
        read_image(tmp_path / "a.png")


# Aspect ratio


@pytest.mark.parametrize("size", [(256, 256), (100, 100), (1, 1), (129, 128)])
def test_right_aspect_ratio_is_used_whole(size: tuple[int, int]):
    assert box_to_use(size, (256, 256), "exact") == (0, 0, size[1], size[0])


def test_another_aspect_ratio_says_which_crop_would_do():
    with pytest.raises(InputError, match="the image is 640x480, the bundle draws 256x512") as error:
        box_to_use((480, 640), (512, 256), "exact")
    assert "crop it to 240x480 pixels" in error.value.fix
    assert box_to_use((480, 640), (512, 256), "crop") == (200, 0, 440, 480)


@settings(deadline=None)
@given(*[st.integers(1, 300)] * 4)
def test_crop_lies_inside_has_the_aspect_ratio_and_touches_two_edges(h: int, w: int, rows: int, columns: int):
    left, top, right, bottom = aspect_box((h, w), (rows, columns))
    assert left >= 0
    assert top >= 0
    assert right - left == w or bottom - top == h
    assert abs((right - left) * rows - (bottom - top) * columns) <= max(rows, columns)


def test_unknown_fit():
    with pytest.raises(InputError, match="fit 'stretch' not understood"):
        box_to_use((4, 4), (4, 4), "stretch")


def test_mask_of_another_aspect_ratio():
    check_same_aspect((50, 100), (100, 200))
    check_same_aspect((50, 101), (100, 200))
    with pytest.raises(InputError, match="the mask is 90x50, the image 200x100"):
        check_same_aspect((50, 90), (100, 200))


def test_same_part_of_a_smaller_picture():
    assert same_part((200, 0, 440, 480), (480, 640), (240, 320)) == (100, 0, 220, 240)


# Masks


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_a_cell_is_touched_where_any_part_of_a_pixel_falls_into_it(h: int, w: int, rows: int, columns: int, seed: int):
    mask = np.random.default_rng(seed).random((h, w)) < 0.15
    expected = np.zeros((rows, columns), bool)
    for y, x in np.argwhere(mask):
        for i in range(rows):
            for j in range(columns):
                meets = y * rows < (i + 1) * h and i * h < (y + 1) * rows
                expected[i, j] |= meets and x * columns < (j + 1) * w and j * w < (x + 1) * columns
    np.testing.assert_array_equal(touched(mask, (rows, columns)), expected)
