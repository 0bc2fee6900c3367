from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fastvar
from demo.bundles import CHECKPOINT, SAMPLING
from demo.growth import FADED, TILE, Gardener, Growth, computed_share, frames, marked, scales_picture, write_animation
from demo.poster import PAPER
from fastvar.core.plan import make_plan
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity_presets import schedule_for
from fastvar.profiling.tuning.metrics import psnr

SCHEDULE = schedule_for((256, 256))
STEPS = make_plan(SCHEDULE, INFINITY.policy("fastvar", SCHEDULE, 4), 4).steps
LAST = STEPS[-1]
PROMPT = "a large red circle in the centre on a white background"


def _growth(color: tuple[int, int, int] = (10, 20, 30)) -> Growth:
    computed = np.ones(LAST.size)
    computed[0, 0] = 0
    return Growth(LAST, np.full((256, 256, 3), color, np.uint8), computed)


def test_shares_count_the_lists_that_name_a_token():
    kept = [np.array([0, 5]), np.array([5, 255])]
    share = computed_share(LAST, kept)
    assert share.shape == (16, 16)
    assert (share[0, 0], share[0, 5], share[15, 15], share[1, 1]) == (0.5, 1.0, 0.5, 0.0)
    assert (computed_share(STEPS[0], []) == 1).all()


def test_tokens_left_out_are_faded():
    image = np.asarray(marked(_growth(), 160))
    assert tuple(image[155, 155]) == (10, 20, 30)
    expected = np.rint(np.array((10, 20, 30)) * FADED + np.array(PAPER) * (1 - FADED))
    assert np.abs(image[5, 5] - expected).max() <= 1


def test_the_picture_has_a_column_for_every_scale():
    picture = np.asarray(scales_picture([_growth(), replace(_growth(), step=STEPS[0])], "a caption"))
    plain = (picture == np.array((10, 20, 30))).all(2)
    for half in np.array_split(plain, 2, axis=1):
        assert 1.7 * TILE * TILE < half.sum() <= 2 * TILE * TILE  # lines of the grid and faded tokens are not plain


def test_the_animation_moves_and_rests_at_its_end(tmp_path: Path):
    file = tmp_path / "growing.webp"
    pictures = frames([[_growth((0, 0, 0)), _growth((250, 0, 0))]] * 2, 64)
    write_animation(pictures, file)
    with Image.open(file) as animation:
        assert animation.n_frames == 2
        assert animation.size == pictures[0].size
        animation.seek(1)
        red = np.asarray(animation.convert("RGB"))[32, 32]
    assert np.abs(red.astype(int) - (250, 0, 0)).max() < 12


@pytest.mark.slow
def test_the_last_scale_is_the_image_that_the_engines_draw(tmp_path: Path, engine_cache: Path):
    out = tmp_path / "bundle"
    fastvar.build(
        CHECKPOINT, size="256x256", policy="fastvar", guidance="on", sampling=SAMPLING, out=out, cache=engine_cache
    )
    image = np.asarray(fastvar.Pipeline.load(out)(PROMPT, seed=7).images[0])
    *_, last = Gardener(CHECKPOINT, "fastvar", 256).grow(PROMPT, 7)
    assert last.computed.mean() == pytest.approx(last.step.kept / last.step.tokens)
    assert psnr(last.image, image) > 40
