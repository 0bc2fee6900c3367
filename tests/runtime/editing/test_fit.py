"""Which part of a picture is used: all of it, or the crop that has the bundle's aspect ratio."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.errors import InputError
from fastvar.runtime.editing.source_image import (
    aspect_box,
    box_to_use,
    check_same_aspect,
    same_part,
)

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
