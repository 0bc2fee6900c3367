import numpy as np
import pytest

from demo.draw_scene import render
from demo.measuring.features import UNITS, distance_to_truth, features, frechet_distance
from demo.read_scene import read_scene
from demo.scenes import RICH, sample_scene


def test_the_distance_of_normal_distributions():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 1, (20000, 3)), rng.normal(0, 1, (20000, 3))
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(first, second) < 0.01
    assert frechet_distance(first + np.array((2, 0, 0)), second) == pytest.approx(4, abs=0.15)
    assert frechet_distance(3 * first, second) == pytest.approx(3 * (3 - 1) ** 2, abs=0.3)


def test_worse_images_are_further_from_the_truth():
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng, RICH) for _ in range(24)]
    truth = [render(scene, 256, rng) for scene in scenes]
    again = [render(scene, 256, rng) for scene in scenes]  # other places, the same world
    frayed = [
        np.where(rng.random((64, 64, 1)).repeat(4, 0).repeat(4, 1) < 0.15, image[:1, :1], image) for image in again
    ]
    near, far = distance_to_truth(again, truth, RICH), distance_to_truth(frayed, truth, RICH)
    assert near < 0.1 * far


def test_an_empty_image_has_features():
    image = np.full((256, 256, 3), 128, np.uint8)
    found = features(image, read_scene(image))
    assert found.shape == (len(UNITS),)
    assert np.isfinite(found).all()
