import numpy as np
import pytest

from demo.draw_scene import render
from demo.measuring.score import accuracy, caption_accuracy, likeness
from demo.read_scene import ATTRIBUTES
from demo.scenes import Scene, Shape, caption, held_out_scenes
from fastvar.errors import InputError
from fastvar.profiling.tuning.metrics import psnr, ssim

ALONE = Scene("white", (Shape("circle", "red", "large", "plain", "centre"),), "alone")
PAIR = Scene(
    "black",
    (Shape("circle", "red", "small", "plain", "left"), Shape("square", "blue", "large", "striped", "right")),
    "left of",
)


def test_clean_renders_score_one():
    scenes = held_out_scenes(20, seed=5)
    shares = accuracy([render(scene) for scene in scenes], scenes)
    assert set(shares) == {*ATTRIBUTES, "overall"}
    assert min(shares.values()) >= 0.95


def test_counts_are_summed_before_they_are_divided():
    # The first image is right; the second shows nothing of its two shapes but the background.
    shares = accuracy([render(ALONE), np.full((256, 256, 3), 12, np.uint8)], [ALONE, PAIR])
    assert shares["color"] == pytest.approx(1 / 3)  # one of three shapes, not the mean of 1 and 0
    assert shares["position"] == 1.0  # of the lone shape alone
    assert shares["relation"] == 0.0
    # readings: 2 backgrounds, 2 counts, 4 x 3 shapes, 1 position, 1 relation
    assert shares["overall"] == pytest.approx((2 + 1 + 4 + 1) / 18)


def test_attribute_without_a_reading_is_not_a_number():
    assert np.isnan(accuracy([render(ALONE)], [ALONE])["relation"])


def test_captions_are_scored_as_their_scenes():
    scenes = held_out_scenes(20, seed=5)
    rng = np.random.default_rng(5)
    images = [render(scene) for scene in scenes]
    captions = [caption(scene, rng) for scene in scenes]
    assert caption_accuracy(images, captions) == accuracy(images, scenes)["overall"]
    assert caption_accuracy(images[::-1], captions) < 0.8


def test_other_prompts_cannot_be_scored():
    with pytest.raises(InputError, match="a portrait of a cat"):
        caption_accuracy([render(ALONE)], ["a portrait of a cat"])


def test_likeness_survives_equal_images():
    image, other = render(ALONE), render(PAIR)
    found = likeness([image, image, other], [image, other, image])
    assert found["identical"] == 1
    assert found["psnr_db_median"] == pytest.approx(psnr(image, other))
    assert found["ssim_mean"] == pytest.approx((1 + 2 * ssim(image, other)) / 3)
