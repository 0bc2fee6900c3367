import itertools
from dataclasses import replace

import numpy as np
import pytest

from demo import scenes
from demo.scenes import RICH, SIMPLE, Scene, Shape, World

HELD_OUT = [("white", "top right"), ("black", "bottom left"), ("gray", "right")]


WORLDS = pytest.mark.parametrize("world", [SIMPLE, RICH], ids=["simple", "rich"])


def _sample(count: int, seed: int = 0, world: World = SIMPLE) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, world) for _ in range(count)]


@WORLDS
def test_shares_of_one_two_and_three_shapes(world: World):
    counts = np.bincount([len(scene.shapes) for scene in _sample(3000, world=world)], minlength=4)[1:] / 3000
    np.testing.assert_allclose(counts, scenes.COUNT_PROBABILITIES, atol=0.03)


def test_three_shapes_are_always_small():
    triples = [scene.shapes for scene in _sample(500) if len(scene.shapes) == 3]
    assert {shape.size for shapes in triples for shape in shapes} == {"small"}


def test_scenes_show_all_that_their_world_has_and_nothing_else():
    for world in (SIMPLE, RICH):
        drawn = _sample(2000, world=world)
        shapes = [shape for scene in drawn for shape in scene.shapes]
        assert {shape.kind for shape in shapes} == set(world.kinds)
        assert {shape.pattern for shape in shapes} == set(world.patterns)
        assert {scene.background for scene in drawn} == set(world.backgrounds)
        assert {scene.relation for scene in drawn} == set(world.relations)


def test_the_rich_world_holds_every_scene_of_the_simple_one():
    for field in ("kinds", "patterns", "backgrounds", "relations"):
        assert set(getattr(SIMPLE, field)) < set(getattr(RICH, field))


def test_about_one_scene_in_twenty_is_held_out_and_never_trained_on():
    assert 0.03 < np.mean([scenes.is_held_out(scene) for scene in _sample(4000)]) < 0.07
    training = itertools.islice(scenes.training_scenes(seed=1), 2000)
    assert not set(training) & set(scenes.held_out_scenes(100, seed=2))


def test_hold_out_does_not_change_between_versions():
    shapes = [Shape("circle", "red", "large", "striped", cell) for cell in scenes.CELLS]
    lone = [Scene(background, (shape,), "alone") for background in SIMPLE.backgrounds for shape in shapes]
    held_out = [(scene.background, scene.shapes[0].cell) for scene in lone if scenes.is_held_out(scene)]
    assert held_out == HELD_OUT


@WORLDS
def test_captions_name_every_attribute_but_plain(world: World):
    rng = np.random.default_rng(3)
    for scene in _sample(300, world=world):
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


def test_an_impossible_scene_is_refused():
    left = Shape("circle", "red", "small", "plain", "left")
    with pytest.raises(ValueError, match="expected one of"):
        Scene("white", (left, left), "above")
    with pytest.raises(ValueError, match="different"):
        Scene("white", (left, Shape("circle", "red", "large", "plain", "right")), "left of")
    with pytest.raises(ValueError, match="color 'pink'"):
        Shape("circle", "pink", "small", "plain", "left")
    with pytest.raises(ValueError, match="outlined ring"):
        Shape("ring", "red", "small", "outlined", "left")


@pytest.mark.parametrize("change", [{"size": "small"}, {"pattern": "outlined"}, {"kind": "ring"}, {"color": "blue"}])
def test_shapes_that_overlap_are_large_and_solid_and_of_two_colors(change: dict[str, str]):
    front = Shape("circle", "red", "large", "plain", "front")
    behind = Shape("square", "blue", "large", "striped", "behind")
    Scene("white", (front, behind), "in front of")
    with pytest.raises(ValueError, match="overlap"):
        Scene("white", (replace(front, **change), behind), "in front of")
