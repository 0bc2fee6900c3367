from itertools import pairwise

import numpy as np
from PIL import Image

from demo.poster import PAPER, Exhibit, hang


def _exhibit(number: int, side: int = 128) -> Exhibit:
    dense = Image.new("RGB", (side, side), (40 + number, 100, 200))
    pruned = Image.new("RGB", (side, side), (40 + number, 90, 200))
    return Exhibit(f"a large striped purple hexagon number {number}", dense, pruned, 100.0, 50.0)


def test_the_difference_is_amplified_and_clipped():
    exhibit = _exhibit(0)
    assert exhibit.difference.getpixel((5, 5)) == (0, 40, 0)
    far = Exhibit("", Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8)), 1.0, 1.0)
    assert far.difference.getpixel((0, 0)) == (255, 0, 0)


def _places(poster: np.ndarray, image: Image.Image) -> tuple[int, int]:
    """Row and column of a plain image's first pixel, which is seen whole and once."""
    found = (poster == np.array(image.getpixel((0, 0)))).all(2)
    rows, columns = np.nonzero(found)
    assert found.sum() == 128 * 128
    assert (np.ptp(rows), np.ptp(columns)) == (127, 127)
    return int(rows.min()), int(columns.min())


def test_every_image_hangs_in_its_place():
    exhibits = [_exhibit(i) for i in range(6)]
    poster = np.asarray(hang(exhibits, "on a machine"))
    dense = [_places(poster, exhibit.dense) for exhibit in exhibits]
    pruned = [_places(poster, exhibit.pruned) for exhibit in exhibits]
    assert [column for _, column in dense] == [column for _, column in pruned]
    assert len({row for row, _ in dense}) == len({row for row, _ in pruned}) == 1
    assert dense[0][0] + 128 < pruned[0][0]
    assert all(first + 128 < second for (_, first), (_, second) in pairwise(dense))


def test_captions_and_figures_stand_under_the_images():
    exhibit = _exhibit(3)
    assert exhibit.figures == "100 ms dense, 50 ms pruned"
    poster = np.asarray(hang([exhibit] * 2, "on a machine"))
    bottom = np.nonzero((poster == np.array((0, 40, 0))).all(2))[0].max()  # of the difference
    assert (poster[bottom + 2 :] != np.array(PAPER)).any(2).sum() > 300
