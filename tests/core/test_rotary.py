from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastvar.core.rotary import grid_positions, rotary_table
from fastvar.families.infinity_presets import all_schedules, extended_schedules, schedule_for

GOLDEN = load_file(Path(__file__).parents[1] / "golden/rotary.safetensors")
RUNS = [("dense_1x1_1M", (1024, 1024)), ("dense_hdivw0.5_0.60M", (592, 1184))]
HEAD_DIM = 16


@pytest.mark.parametrize(("run", "pixels"), RUNS)
def test_positions_of_every_token_of_the_published_runs(run, pixels):
    schedule = schedule_for(pixels)
    found = np.concatenate([grid_positions(size, schedule.rope_grid) for size in schedule.sizes])
    np.testing.assert_array_equal(found, GOLDEN[f"{run}.rope.hw_index"])


@pytest.mark.parametrize(("run", "pixels"), RUNS)
def test_cosines_and_sines_of_the_published_runs(run, pixels):
    schedule = schedule_for(pixels)
    found = np.concatenate([rotary_table(s, schedule.rope_grid, HEAD_DIM) for s in schedule.sizes], axis=1)
    rows = GOLDEN[f"{run}.rope.sample_rows"]
    np.testing.assert_allclose(found[:, rows], GOLDEN[f"{run}.rope.sample_cos_sin"], atol=1e-5)


def test_a_half_rounds_to_the_even_position():
    assert grid_positions((4, 1), (10, 1))[:, 0].tolist() == [0, 2, 5, 8]  # 2.5 and 7.5


@pytest.mark.parametrize("schedule", all_schedules().values(), ids=lambda s: "x".join(map(str, s.pixels)))
def test_positions_grow_and_stay_on_the_trained_grid(schedule):
    for size in schedule.sizes:
        positions = grid_positions(size, schedule.rope_grid).reshape(*size, 2)
        for axis, along in enumerate((positions[:, 0, 0], positions[0, :, 1])):
            assert along[0] == 0
            assert (np.diff(along) > 0).all()  # no two rows and no two columns share a position
            assert along[-1] < schedule.rope_grid[axis]


@pytest.mark.parametrize("schedule", extended_schedules().values(), ids=lambda s: "x".join(map(str, s.pixels)))
def test_beyond_the_trained_resolution_official_scales_keep_their_positions(schedule):
    h, w = schedule.sizes[12]
    official = schedule_for((h * 16, w * 16))
    assert schedule.rope_grid == official.rope_grid
    for size in official.sizes:
        positions = grid_positions(size, schedule.rope_grid)
        np.testing.assert_array_equal(positions, grid_positions(size, official.rope_grid))
        assert (positions == np.rint(positions)).all()
    np.testing.assert_array_equal(grid_positions((h, w), (h, w)).reshape(h, w, 2)[-1, -1], (h - 1, w - 1))


def test_positions_finer_than_the_grid_keep_their_fractions():
    assert grid_positions((8, 1), (4, 1))[:, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]


def test_first_half_turns_with_the_row_second_with_the_column():
    cos, _ = rotary_table((2, 3), (2, 3), 8).reshape(2, 2, 3, 4)
    assert np.ptp(cos[..., :2], axis=1).max() == 0
    assert np.ptp(cos[..., 2:], axis=0).max() == 0
    np.testing.assert_allclose(cos[1, 2], np.cos([1, 0.01, 2, 0.02]), atol=1e-6)


def test_table_is_float32_of_half_the_head():
    table = rotary_table((3, 5), (6, 10), 12)
    assert table.dtype == np.float32
    assert table.shape == (2, 15, 6)
