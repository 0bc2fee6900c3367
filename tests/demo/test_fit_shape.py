import numpy as np
import pytest

from demo.draw_scene import signed_distance
from demo.fit_shape import UNIT_AREAS, Fit, filled, fit_hidden, fit_open, fit_whole, ideal, regions

SIDE = (128, 128)


@pytest.mark.parametrize("kind", UNIT_AREAS)
@pytest.mark.parametrize("radius", [15.0, 25.0])
def test_a_whole_shape_is_found_where_it_is(kind: str, radius: float):
    true = Fit(kind, radius, (60.3, 70.7))
    found = fit_whole(ideal(true, SIDE), UNIT_AREAS)
    assert found.kind == kind
    assert found.radius == pytest.approx(radius, abs=0.5)
    assert found.centre == pytest.approx(true.centre, abs=0.7)


@pytest.mark.parametrize("kind", UNIT_AREAS)
def test_a_shape_is_found_by_the_part_that_is_seen(kind: str):
    true = Fit(kind, 25.0, (60.0, 70.0))
    hidden = ideal(Fit("circle", 22.0, (45.0, 58.0)), SIDE)
    whole = ideal(true, SIDE)
    assert 0.4 < (whole & ~hidden).sum() / whole.sum() < 0.9
    found = fit_hidden(whole & ~hidden, hidden, UNIT_AREAS)
    assert found.kind == kind
    assert found.radius == pytest.approx(25.0, abs=2)


def test_outlines_and_rings_have_holes():
    kinds = (*UNIT_AREAS, "ring")
    grid = np.arange(128, dtype=np.float32)
    distance = signed_distance("hexagon", grid[None, :] - 64, grid[:, None] - 64, 15.0)
    outline = (distance < 0.7) & (distance > -3.2)
    found = fit_open(outline, kinds)
    assert (found.kind, found.outlined) == ("hexagon", True)
    found = fit_open(ideal(Fit("ring", 15.0, (64.0, 64.0)), SIDE), kinds)
    assert (found.kind, found.outlined) == ("ring", False)
    assert found.radius == pytest.approx(15.0, abs=0.5)


def test_holes_are_filled_and_bays_are_not():
    mask = np.zeros((9, 9), bool)
    mask[2:7, 2:7] = True
    mask[4, 4] = False  # a hole
    mask[3, 6] = False  # a bay
    whole = filled(mask)
    assert whole[4, 4]
    assert not whole[3, 6]
    assert whole.sum() == 24


def test_regions_are_apart_and_large_enough():
    mask = np.zeros((8, 8), bool)
    mask[0:2, 0:2] = mask[4:8, 4:8] = mask[7, 0] = True
    assert sorted(int(region.sum()) for region in regions(mask, 2)) == [4, 16]
