import itertools

import numpy as np
import pytest

from demo import scenes
from demo.scenes import Scene, Shape

HELD_OUT = [("white", "top right"), ("black", "bottom left"), ("gray", "right")]


def _sample(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng) for _ in range(count)]


def test_shares_of_one_two_and_three_shapes():
    counts = np.bincount([len(scene.shapes) for scene in _sample(3000)], minlength=4)[1:] / 3000
    np.testing.assert_allclose(counts, scenes.COUNT_PROBABILITIES, atol=0.03)


def test_three_shapes_are_always_small():
    triples = [scene.shapes for scene in _sample(500) if len(scene.shapes) == 3]
    assert {shape.size for shapes in triples for shape in shapes} == {"small"}


def test_about_one_scene_in_twenty_is_held_out_and_never_trained_on():
    assert 0.03 < np.mean([scenes.is_held_out(scene) for scene in _sample(4000)]) < 0.07
    training = itertools.islice(scenes.training_scenes(seed=1), 2000)
    assert not set(training) & set(scenes.held_out_scenes(100, seed=2))


def test_hold_out_does_not_change_between_versions():
    shapes = [Shape("circle", "red", "large", "striped", cell) for cell in scenes.CELLS]
    lone = [Scene(background, (shape,), "alone") for background in scenes.BACKGROUNDS for shape in shapes]
    held_out = [(scene.background, scene.shapes[0].cell) for scene in lone if scenes.is_held_out(scene)]
    assert held_out == HELD_OUT


def test_captions_name_every_attribute_but_plain():
    rng = np.random.default_rng(3)
    for scene in _sample(300):
        text = scenes.caption(scene, rng)
        assert f"on a {scene.background} background" in text
        for shape in scene.shapes:
            assert f"{shape.color} {shape.kind}" in text
            assert len(scene.shapes) == 3 or shape.size in text
            assert shape.pattern == "plain" or shape.pattern in text
        assert "plain" not in text


def test_reversed_phrasing_swaps_the_order():
    small = {"size": "small", "pattern": "plain"}
    shapes = (Shape("circle", "red", cell="left", **small), Shape("square", "blue", cell="right", **small))
    rng = np.random.default_rng(0)
    for text in {scenes.caption(Scene("white", shapes, "left of"), rng) for _ in range(50)}:
        assert ("left of" in text) == (text.index("red circle") < text.index("blue square"))


def test_same_rng_same_pixels_and_no_rng_no_jitter():
    scene = _sample(1)[0]
    first, second = (scenes.render(scene, rng=np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (256, 256, 3)
    assert first.dtype == np.uint8
    assert (first != scenes.render(scene)).any()


@pytest.mark.parametrize("pattern", ["striped", "checked"])
def test_every_patch_inside_a_patterned_shape_is_alike(pattern):
    shape = Shape("square", "green", "large", pattern, "centre")
    image = scenes.render(Scene("black", (shape,), "alone"), rng=np.random.default_rng(0))
    inside = image[96:160, 96:160].reshape(4, 16, 4, 16, 3).swapaxes(1, 2).reshape(16, 16, 16, 3)
    assert (inside == inside[0]).all()
    assert len(np.unique(inside[0].reshape(-1, 3), axis=0)) == 2


def test_larger_renders_show_the_same_scene():
    for scene in _sample(10):
        large = scenes.render(scene, 512).reshape(256, 2, 256, 2, 3).mean((1, 3))
        assert abs(large - scenes.render(scene)).mean() < 0.5


def test_shapes_stay_inside_and_apart():
    """Every border pixel is background, also with jitter."""
    rng = np.random.default_rng(6)
    for scene in _sample(100):
        image = scenes.render(scene, rng=rng)
        image[4:-4, 4:-4] = scenes.BACKGROUNDS[scene.background]
        assert (image == scenes.BACKGROUNDS[scene.background]).all()


def test_an_impossible_scene_is_refused():
    left = Shape("circle", "red", "small", "plain", "left")
    with pytest.raises(ValueError, match="expected one of"):
        Scene("white", (left, left), "above")
    with pytest.raises(ValueError, match="different"):
        Scene("white", (left, Shape("circle", "red", "large", "plain", "right")), "left of")
    with pytest.raises(ValueError, match="color 'pink'"):
        Shape("circle", "pink", "small", "plain", "left")
