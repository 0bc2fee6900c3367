from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.measuring.inpaint import CHANGES
from demo.measuring.upscale import BASELINE, CONTROL, OURS, RAW, SHOWN, measure, reduced, sheet, summary, table
from demo.scenes import SIZES
from fastvar import Pipeline


def test_reduction_averages():
    truth = np.array([[0, 10, 3, 3], [20, 30, 3, 3]], np.uint8).repeat(2, 0)[..., None].repeat(3, -1)
    assert np.asarray(reduced(truth, 2))[..., 0].tolist() == [[5, 3], [25, 3]]


def test_wins_are_counted_scene_by_scene():
    found = summary({BASELINE: [30.0, 31.0, 32.0], CONTROL: [31.0, 31.0, 31.0], OURS: [32.0, 30.0, 32.5]})
    assert found[OURS] == {
        "psnr_db_mean": pytest.approx(31.5),
        "psnr_db_median": 32.0,
        "better_than_bicubic": 2,
        "better_than_consistent_bicubic": 2,
    }
    assert found[BASELINE]["better_than_bicubic"] == 0
    assert list(table("", found).columns[3].cells) == ["0", "1", "2"]


def test_every_method_is_measured_on_every_scene(editing_bundle: Path):
    """The model is random, so only consistency makes ours any good."""
    count = SHOWN[0] + 1
    scores, shown = measure(Pipeline.load(editing_bundle), count, 4)
    assert {len(values) for values in scores.values()} == {count}
    assert np.mean(scores[RAW]) < 20 < np.mean(scores[OURS])
    assert np.mean(scores[BASELINE]) > 25
    assert {image.size for image in shown[0].values()} == {(256, 256)}


def test_sheet_shows_the_scenes_it_says():
    images = dict.fromkeys(("input", BASELINE, OURS, "truth"), Image.new("RGB", (64, 64)))
    assert sheet([images] * len(SHOWN)).height > 4 * 64


def test_changes_of_the_inpainting_sheet():
    for change in CHANGES:
        old, new = (scene.shapes[change.position] for scene in (change.scene, change.wanted))
        assert (new.cell, new.size) == (old.cell, old.size)
        assert (new.kind, new.color, new.pattern) == (change.kind, change.color, change.pattern)
        assert sum(a != b for a, b in zip(change.scene.shapes, change.wanted.shapes, strict=True)) == 1
        x, y = (int(place * 256) for place in old.centre)
        assert change.mask.getpixel((x, y)) == 255
        assert change.mask.getpixel((x, max(y - int(SIZES[old.size]) - 20, 0))) == 0
