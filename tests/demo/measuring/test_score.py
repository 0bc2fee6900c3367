import numpy as np
import pytest
from PIL import Image

from demo.draw_scene import render
from demo.measuring.score import (
    NAMES,
    accuracy,
    accuracy_table,
    caption_accuracy,
    evaluate,
    likeness,
    likeness_table,
    readings,
)
from demo.read_caption import read_caption
from demo.read_scene import ATTRIBUTES
from demo.scenes import Scene, Shape, caption, held_out_scenes
from fastvar.errors import InputError
from fastvar.profiling.tuning.metrics import psnr, ssim
from fastvar.runtime.output import ImageTimings, Output, ScaleTiming

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


class DrawsTruth:
    """A pipeline that draws what scenes show; a share of its images belong to other captions."""

    def __init__(self, wrong: float, ms: float) -> None:
        self.wrong, self.ms = wrong, ms

    def __call__(self, prompt: str, params: object, seed: int) -> Output:
        scene = PAIR if np.random.default_rng(seed).random() < self.wrong else read_caption(prompt)
        image = Image.fromarray(render(scene, rng=np.random.default_rng(seed)))
        settings = {"guidance_scale": 3.0, "tau": 0.5, "top_p": 0.97}
        return Output(
            [image], [prompt], [seed], settings, [ImageTimings(1.0, (ScaleTiming(0, (1, 1), 1, 1, self.ms),), 1.0)]
        )


def test_a_worse_policy_scores_less_and_its_interval_says_so():
    result = evaluate({"dense": DrawsTruth(0.0, 10), "pruned": DrawsTruth(0.3, 5)}, 60, seed=3)
    assert result["accuracy"]["dense"]["overall"] > 0.99
    assert result["accuracy"]["pruned"]["overall"] < 0.9
    low, high = result["intervals"]["pruned"]["overall"]
    assert low < result["accuracy"]["pruned"]["overall"] < high
    assert result["share_of_first"]["pruned"][1] < 0.99
    assert result["distance_to_truth"]["dense"] < result["distance_to_truth"]["pruned"]
    assert result["scales_ms"] == {"dense": 10, "pruned": 5}
    assert len(list(accuracy_table(result).columns[1].cells)) == len(NAMES)
    assert list(likeness_table(result).columns[0].cells) == ["dense", "pruned"]


def test_readings_count_every_attribute_and_all_of_them():
    counts = readings([render(ALONE), render(PAIR)], [ALONE, PAIR])
    assert counts.shape == (2, len(NAMES), 2)
    assert (counts[:, :-1].sum(1) == counts[:, -1]).all()
    assert counts[:, -1].tolist() == [[7, 7], [11, 11]]
