"""What is measured around a mask: tokens that it does not touch, before the image's own pixels return."""

import numpy as np
import pytest
from PIL import Image

from demo.measuring.background import Background, background_of, outside
from fastvar import Pipeline


def test_pixels_of_the_tokens_that_the_mask_does_not_touch():
    mask = Image.new("L", (64, 32))
    mask.putpixel((17, 3), 255)
    found = outside(mask, (2, 4))
    expected = np.ones((32, 64), bool)
    expected[:16, 16:32] = False
    np.testing.assert_array_equal(found, expected)


def test_redrawn_images_and_the_round_trip_are_compared_there(var_editing_bundle):
    levels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    image = Image.fromarray(levels).resize((128, 128), Image.Resampling.BICUBIC)
    mask = Image.new("L", (128, 128))
    mask.paste(255, (70, 83, 108, 121))
    with Pipeline.load(var_editing_bundle) as pipe:
        found = background_of(pipe, image, mask, {"class_labels": 3}, seeds=[4, 5])
        (drawn,) = pipe.inpaint(image, mask, class_labels=3, seed=5, composite=False).images
        (kept,) = pipe.upscale(image, class_labels=3, keep_scales=5, consistency=False).images
    for one, decibels in ((drawn, found.drawn[1]), (kept, found.round_trip)):
        error = np.square(np.asarray(one, float) - np.asarray(image, float))[outside(mask, (8, 8))].mean()
        assert decibels == pytest.approx(10 * np.log10(255**2 / error))
    assert len({*found.drawn, found.round_trip}) == 3
    assert str(Background((30.0, 31.0), 40.06)) == "30.5 dB (30.0 to 31.0), the tokenizer's round trip 40.1 dB"
