import numpy as np
import pytest

from demo.draw_scene import BASE_SIDE, OUTLINE_WIDTH, background_levels, render, signed_distance
from demo.fit_shape import UNIT_AREAS
from demo.scenes import BACKGROUNDS, COLORS, KINDS, LEVELS, RICH, Scene, Shape, sample_scene


def test_same_rng_same_pixels_and_no_rng_no_jitter():
    scene = sample_scene(np.random.default_rng(0), RICH)
    first, second = (render(scene, rng=np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (256, 256, 3)
    assert first.dtype == np.uint8
    assert (first != render(scene)).any()


@pytest.mark.parametrize("pattern", ["striped", "checked"])
def test_every_patch_inside_a_patterned_shape_is_alike(pattern):
    shape = Shape("square", "green", "large", pattern, "centre")
    image = render(Scene("black", (shape,), "alone"), rng=np.random.default_rng(0))
    inside = image[96:160, 96:160].reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 16, 16, 3)
    assert (inside == inside[0]).all()
    assert len(np.unique(inside[0].reshape(-1, 3), axis=0)) == 2


def test_larger_renders_show_the_same_scene():
    rng = np.random.default_rng(0)
    for scene in (sample_scene(rng, RICH) for _ in range(20)):
        large = render(scene, 512).reshape(256, 2, 256, 2, 3).mean((1, 3))
        assert abs(large - render(scene)).mean() < 0.5


def test_shapes_stay_inside_and_apart():
    """Every border pixel is background, also with jitter."""
    rng = np.random.default_rng(6)
    for scene in (sample_scene(rng, RICH) for _ in range(200)):
        image = render(scene, rng=rng)
        expected = np.rint(background_levels(scene.background, 256)).astype(np.uint8)
        image[4:-4, 4:-4] = expected[4:-4, 4:-4, None]
        assert (image == expected[..., None]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_areas_are_those_of_the_ideal_shapes(kind: str):
    places = (np.arange(400) + 0.5) / 160 - 1.25
    area = (signed_distance(kind, places[None, :], places[:, None], 1.0) < 0).mean() * 2.5**2
    assert area == pytest.approx(np.pi * 0.75 if kind == "ring" else UNIT_AREAS[kind], rel=0.01)


@pytest.mark.parametrize("size", [256, 512])
def test_an_outline_is_thin_and_its_inside_is_background(size: int):
    shape = Shape("square", "red", "large", "outlined", "centre")
    image = render(Scene("dotted white", (shape,), "alone"), size)
    row = image[size // 2, : size // 2].astype(int)
    red = np.nonzero(row[:, 0] - row[:, 1] > 100)[0]
    assert len(red) == pytest.approx(OUTLINE_WIDTH * size / BASE_SIDE, abs=1)
    assert (np.diff(red) == 1).all()
    assert (image[size // 2, size // 2] == image[size // 2, 0]).all()


def test_the_front_shape_hides_the_one_behind():
    shapes = (Shape("circle", "red", "large", "plain", "front"), Shape("circle", "blue", "large", "plain", "behind"))
    image = render(Scene("white", shapes, "in front of"))
    assert (image[128, 128] == COLORS["red"]).all()
    assert (image[112, 190] == COLORS["blue"]).all()


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_backgrounds_differ_as_they_are_named(background: str):
    levels = background_levels(background, 256)
    ramp, spread = levels[0].mean() - levels[-1].mean(), np.ptp(levels, axis=1).max()
    assert (ramp > 60) == background.startswith("gradient")
    assert (spread > 50) == background.startswith("dotted")
    assert 0 <= levels.min() <= levels.max() <= 255
    nearest = min(LEVELS, key=lambda name: abs(LEVELS[name] - np.median(levels)))
    assert background.endswith(nearest)
