from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from demo.draw_scene import render
from demo.read_scene import ATTRIBUTES, Reading, SeenShape, read_scene, score
from demo.scenes import RICH, SIMPLE, Scene, Shape, World, sample_scene

RED = Shape("circle", "red", "small", "plain", "left")
BLUE = Shape("square", "blue", "large", "striped", "right")
PAIR = Scene("white", (RED, BLUE), "left of")


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Separable Gaussian blur, uint8 [S, S, 3] -> float [S, S, 3]."""
    offsets = np.arange(-5, 6)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    for axis in (0, 1):
        index = np.clip(np.arange(image.shape[axis])[:, None] + offsets, 0, image.shape[axis] - 1)
        image = sum(weight * np.take(image, index[:, i], axis) for i, weight in enumerate(kernel / kernel.sum()))
    return image


def _degrade(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur, noise, a colour cast and a few small blobs: what a small image tokenizer leaves behind."""
    result = _blur(image, 1.5) + rng.normal(0, 8, image.shape) + rng.uniform(-12, 12, 3)
    for y, x in rng.integers(10, 240, (4, 2)):
        result[y : y + 6, x : x + 6] = rng.uniform(0, 255, 3)
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


def _accuracy(
    count: int, seed: int, degrade=lambda image, rng: image, world: World = SIMPLE, size: int = 256
) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    correct, total = Counter(), Counter()
    for _ in range(count):
        scene = sample_scene(rng, world)
        result = score(read_scene(degrade(render(scene, size, rng), rng), world), scene)
        correct.update({name: hits for name, (hits, _) in result.items()})
        total.update({name: trials for name, (_, trials) in result.items()})
    return {name: correct[name] / total[name] for name in ATTRIBUTES}


def test_reads_clean_renders():
    accuracy = _accuracy(200, seed=0)
    assert min(accuracy.values()) >= 0.99, accuracy


def test_reads_degraded_renders():
    accuracy = _accuracy(200, seed=1, degrade=_degrade)
    assert min(accuracy.values()) >= 0.97, accuracy


@pytest.mark.parametrize("size", [256, 512])
def test_reads_the_rich_world(size: int):
    accuracy = _accuracy(150, seed=2, world=RICH, size=size)
    assert min(accuracy.values()) >= 0.99, accuracy


def test_reads_degraded_renders_of_the_rich_world():
    accuracy = _accuracy(100, seed=3, degrade=_degrade, world=RICH)
    assert min(accuracy.values()) >= 0.97, accuracy


FRONT = Shape("circle", "red", "large", "plain", "front")
BEHIND = Shape("star", "blue", "large", "striped", "behind")
OVERLAP = Scene("gradient gray", (FRONT, BEHIND), "in front of")


def test_shapes_in_the_wrong_order_fail_the_relation_only():
    swapped = Scene("gradient gray", (replace(BEHIND, cell="front"), replace(FRONT, cell="behind")), "in front of")
    result = score(read_scene(render(swapped), RICH), OVERLAP)
    assert result.pop("relation") == (0, 1)
    assert all(correct == total for correct, total in result.values())


def test_shapes_apart_do_not_stand_in_front_of_each_other():
    apart = Scene("gradient gray", (replace(FRONT, cell="left"), replace(BEHIND, cell="right")), "left of")
    result = score(read_scene(render(apart), RICH), OVERLAP)
    assert result.pop("relation") == (0, 1)
    assert all(correct == total for correct, total in result.values())


@pytest.mark.parametrize(("kind", "pattern"), [("circle", "outlined"), ("ring", "plain"), ("circle", "plain")])
@pytest.mark.parametrize("size", ["small", "large"])
def test_rings_outlines_and_discs_are_told_apart(kind: str, pattern: str, size: str):
    scene = Scene("dotted black", (Shape(kind, "cyan", size, pattern, "centre"),), "alone")
    (seen,) = read_scene(render(scene), RICH).shapes
    assert (seen.kind, seen.pattern, seen.size) == (kind, pattern, size)


def test_reads_any_multiple_of_the_grid():
    assert score(read_scene(render(PAIR, 512)), PAIR)["pattern"] == (2, 2)
    with pytest.raises(ValueError, match="multiple of 128"):
        read_scene(np.zeros((200, 200, 3), np.uint8))


@pytest.mark.parametrize(
    ("attribute", "field", "value"),
    [
        ("color", "color", "green"),
        ("shape", "kind", "triangle"),
        ("size", "size", "large"),
        ("pattern", "pattern", "checked"),
    ],
)
def test_one_wrong_attribute_costs_exactly_that(attribute, field, value):
    painted = replace(PAIR, shapes=(replace(RED, **{field: value}), BLUE))
    result = score(read_scene(render(painted)), PAIR)
    assert result.pop(attribute) == (1, 2)
    assert all(correct == total for correct, total in result.values())


def test_swapped_shapes_fail_the_relation_only():
    swapped = replace(PAIR, shapes=(replace(BLUE, cell="left"), replace(RED, cell="right")))
    result = score(read_scene(render(swapped)), PAIR)
    assert result.pop("relation") == (0, 1)
    assert all(correct == total for correct, total in result.values())


def test_wrong_cell_and_wrong_background():
    wanted = Scene("white", (RED,), "alone")
    painted = Scene("gray", (replace(RED, cell="top left"),), "alone")
    result = score(read_scene(render(painted)), wanted)
    assert (result["position"], result["background"], result["relation"]) == ((0, 1), (0, 1), (0, 0))


def test_missing_and_surplus_shapes():
    alone = Scene("white", (RED,), "alone")
    missing = score(read_scene(render(alone)), PAIR)
    assert (missing["count"], missing["color"], missing["relation"]) == ((0, 1), (1, 2), (0, 1))
    surplus = score(read_scene(render(PAIR)), alone)
    assert (surplus["count"], surplus["color"], surplus["position"]) == ((0, 1), (1, 1), (1, 1))


def test_noise_is_read_without_an_error():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert all(isinstance(shape, SeenShape) for shape in read_scene(noise).shapes)
    assert read_scene(np.full((256, 256, 3), 240, np.uint8)) == Reading("white", ())
