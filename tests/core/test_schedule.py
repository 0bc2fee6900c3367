import json
from pathlib import Path

import pytest

from fastvar.core.schedule import ScaleSchedule, parse_size
from fastvar.errors import PlanError
from fastvar.families.infinity_presets import (
    BUCKETS,
    all_schedules,
    extended_schedules,
    official_schedules,
    schedule_for,
    shapes,
)

PUBLISHED = json.loads((Path(__file__).parents[1] / "golden/infinity_schedules.json").read_text())
CASES = [(ratio, bucket) for ratio, budgets in PUBLISHED.items() for bucket in budgets]


def test_the_published_list_has_sixty_schedules_and_so_have_we():
    assert len(CASES) == 60
    assert len(official_schedules()) == 60


@pytest.mark.parametrize(("ratio", "bucket"), CASES)
def test_schedule_of_every_published_size(ratio, bucket):
    entry = PUBLISHED[ratio][bucket]
    found = schedule_for(tuple(entry["pixels_h_w"]))
    assert found.sizes == tuple(tuple(size) for size in entry["scales"])
    assert found.rope_grid == tuple(PUBLISHED[ratio]["1M"]["scales"][-1])
    assert found.bucket == bucket
    assert found.pixels == tuple(entry["pixels_h_w"])
    assert len(found) == BUCKETS[bucket]


# Width by height; the first seven are FastVAR's, with their transposes, the last two ours.
BEYOND = ["960x1920", "1920x960", "1344x1344", "1344x1008", "1008x1344", "1536x1536", "2048x2048"]


def test_sizes_beyond_the_trained_resolution():
    assert set(extended_schedules()) == {parse_size(text) for text in BEYOND}
    assert not set(extended_schedules()) & set(official_schedules())


@pytest.mark.parametrize("size", BEYOND)
def test_a_longer_schedule_is_an_official_one_and_further_scales(size):
    found = schedule_for(parse_size(size))
    official = [s.sizes for s in official_schedules().values() if s.bucket == "1M"]
    assert found.sizes[:13] in official
    assert found.rope_grid == found.sizes[12]
    assert len(found) == (15 if size == "2048x2048" else 14)
    assert found.zero_shot
    assert found.final[0] * 16 == found.pixels[0]


def test_no_official_schedule_is_zero_shot():
    assert not any(schedule.zero_shot for schedule in official_schedules().values())


@pytest.mark.parametrize("schedule", all_schedules().values(), ids=lambda s: "x".join(map(str, s.pixels)))
def test_the_level_embeddings_of_the_published_models_reach(schedule):
    assert len(schedule) <= 15


def test_tokens_and_final_grid():
    found = schedule_for((512, 512))
    assert [found.tokens(i) for i in (0, 8, 9)] == [1, 576, 1024]
    assert found.final == (32, 32)


def test_landscape_is_the_transpose_of_portrait():
    portrait, landscape = schedule_for((1120, 896)), schedule_for((896, 1120))
    assert landscape.sizes == tuple((w, h) for h, w in portrait.sizes)
    assert landscape.rope_grid == (56, 70)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024x768", (768, 1024)), ("1024", (1024, 1024)), (" 896 X 1120 ", (1120, 896)), ("640×480", (480, 640))],  # noqa: RUF001 users type the sign
)
def test_sizes_are_written_width_first(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("1:1", (1024, 1024)),
        ("16:9", (768, 1344)),
        (" 9 : 16", (1344, 768)),
        ("3:2", (832, 1248)),
        ("99:1", (592, 1776)),
    ],
)
def test_a_shape_takes_the_nearest_size_of_1m(shape, size):
    assert parse_size(shape, shapes()) == size


@pytest.mark.parametrize(
    "text", ["1:0", "0:1", "16:9:1", ":", "", "x", "1024x", "-1x5", "1024x768x3", "10.5", "123456"]
)
def test_what_is_not_a_size(text):
    with pytest.raises(PlanError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_a_shape_needs_sizes_to_choose_among():
    with pytest.raises(PlanError, match="16:9 stands for no size"):
        parse_size("16:9")


def test_unsupported_size_names_the_nearest_ones_width_first():
    with pytest.raises(PlanError) as error:
        schedule_for((1120, 900))
    assert "900x1120" in error.value.problem
    assert error.value.fix.split(": ")[1].startswith("896x1120")
    assert error.value.fix.count("x") == 4


@pytest.mark.parametrize("sizes", [(), ((0, 1),), ((2, 2), (1, 3)), ((2, 2), (3, 1))])
def test_schedules_that_make_no_sense(sizes):
    with pytest.raises(PlanError):
        ScaleSchedule(sizes, (4, 4))
