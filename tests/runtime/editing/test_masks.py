"""Masks that users give: holes in a picture, white paint, zeros and ones; and the cells that they touch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvar.errors import InputError
from fastvar.runtime.editing.source_image import (
    read_mask,
    touched,
)
from tests.runtime.editing.pictures import RIGHT_HALF

# Masks


def hole_in(levels: object, alpha: int = 0) -> Image.Image:
    """A picture with its right half erased; what is left of its colours there must not matter."""
    colours = np.broadcast_to(np.asarray(levels, np.uint8), (4, 6, 3))
    return Image.fromarray(np.dstack([colours, np.where(RIGHT_HALF, alpha, 255).astype(np.uint8)]))


GRADIENT = (np.arange(72) * 3).reshape(4, 6, 3)


@pytest.mark.parametrize("alpha", [0, 1, 127])
@pytest.mark.parametrize("levels", [GRADIENT, 0, 90, 240], ids=["photo", "black", "dark", "light"])
def test_the_hole_in_a_picture_is_redrawn(levels: object, alpha: int):
    np.testing.assert_array_equal(read_mask(hole_in(levels, alpha)), RIGHT_HALF)
    np.testing.assert_array_equal(read_mask(np.asarray(hole_in(levels, alpha))), RIGHT_HALF)


def test_everything_erased():
    assert read_mask(Image.new("RGBA", (6, 4))).all()


def test_white_paint_with_transparent_parts_could_mean_either():
    strokes = np.where(np.arange(6) == 0, 0, 255)[None, :, None]
    for painted in (255, 250, strokes):
        with pytest.raises(InputError, match="either could be what is to be redrawn") as error:
            read_mask(hole_in(painted))
        assert "put black behind it" in error.value.fix


def test_colours_count_where_nothing_is_erased():
    bright = np.where(RIGHT_HALF, 255, 0)[..., None]
    np.testing.assert_array_equal(read_mask(hole_in(bright, 255)), RIGHT_HALF)
    np.testing.assert_array_equal(read_mask(hole_in(bright, 200)), RIGHT_HALF)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_masks_of_0_and_1(dtype: type):
    array = RIGHT_HALF.astype(dtype)
    np.testing.assert_array_equal(read_mask(array), RIGHT_HALF)
    assert not read_mask(np.zeros((4, 6), dtype)).any()
    assert read_mask(np.ones((4, 6), dtype)).all()
    if dtype in (np.uint8, np.uint16, np.int32):
        np.testing.assert_array_equal(read_mask(Image.fromarray(array)), RIGHT_HALF)


def test_masks_of_two_colours():
    np.testing.assert_array_equal(read_mask(Image.fromarray(RIGHT_HALF)), RIGHT_HALF)  # mode "1"
    np.testing.assert_array_equal(read_mask(np.repeat(RIGHT_HALF[..., None], 3, 2).astype(np.uint8)), RIGHT_HALF)


@pytest.mark.parametrize("level", [2, 100, 127])
def test_a_mask_without_white_names_its_brightest_level(level: int):
    with pytest.raises(InputError, match=f"its brightest level is {level} of 255, so it holds no white"):
        read_mask(np.where(RIGHT_HALF, level, 0).astype(np.uint8))


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
