"""The memory plan against what a pipeline really takes: to the byte on a device of its own, nearly so on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from demo.bundles import CHECKPOINT, SAMPLING
from fastvar.core.plan import make_plan
from fastvar.core.precision import Precision
from fastvar.core.schedule import parse_size
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.registry import backend_class
from fastvar.export.build import build
from fastvar.export.checkpoints.random_weights import random_checkpoint
from fastvar.export.describe import describe
from fastvar.export.options import BuildOptions
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity_presets import schedule_for
from fastvar.profiling.estimates.memory_plan import MemoryPlan, Part, memory_plan, part_of
from fastvar.profiling.memory_run import memory_run_apart
from fastvar.profiling.records import Request
from fastvar.runtime.memory.fit import total_need
from fastvar.runtime.memory.layout import build_layout
from tests.fakes.recording import Played

GIB = 2**30


def described(size: str, policy: str, **options: object) -> Manifest:
    """Infinity-2B with its text encoder, as TensorRT-RTX engines in bf16."""
    checkpoint, schedule = random_checkpoint("infinity_2b", text_encoder=True), schedule_for(parse_size(size))
    plan = make_plan(schedule, INFINITY.policy(policy, schedule, 32), 32)
    return describe(checkpoint, plan, backend_class("tensorrt-rtx"), Precision("bfloat16"), BuildOptions(**options))


@pytest.fixture(scope="module")
def published() -> MemoryPlan:
    return memory_plan(described("1024x1024", "fastvar", guidance="on"))


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
def test_the_plan_before_the_build_is_what_the_runtime_allocates(tiny_bundle: Path, tiny_checkpoint, offload: bool):
    """Described, nothing built; against the one allocation that the bundle's memory makes on a device of its own."""
    built = Bundle.open(tiny_bundle).manifest
    before = describe(tiny_checkpoint, built.plan, backend_class("tensorrt-rtx"), Precision())
    plan = memory_plan(replace(before, address_alignment=1), offload_text_encoder=offload)
    played = Played(built, offload)
    assert played.device.allocations == [plan.need.total_bytes]
    assert plan.need.weight_bytes == played.memory.weight_bytes
    assert plan.need.arena_bytes == played.memory.arena_bytes


def test_on_the_host_the_library_takes_more(tiny_bundle: Path):
    manifest = Bundle.open(tiny_bundle).manifest
    plan, offloaded = memory_plan(manifest), memory_plan(manifest, offload_text_encoder=True)
    assert plan.need.library_bytes > 32 << 20
    assert all(moment.used[Part.LIBRARY] == plan.need.library_bytes for moment in plan.moments)
    assert offloaded.need == plan.need, "there is no other place to bring it from"


def test_what_is_in_use_never_exceeds_what_is_allocated(published: MemoryPlan):
    assert all(moment.total <= published.need.total_bytes for moment in published.moments)
    assert published.peak.total > 0.99 * published.need.total_bytes


def test_keys_grow_scale_by_scale_to_the_capacity(published: MemoryPlan):
    keys = [moment.used[Part.KEYS] for moment in published.moments if moment.what.startswith("scale")]
    assert keys == sorted(keys)
    token = 2 * 2 * 2048 * 2  # keys and values, two rows, bf16
    assert keys[-1] == token * (25 * 2912 + 7 * 4121)
    assert keys[0] == token * 32


def test_caches_live_from_where_they_are_filled_to_the_last_scale(published: MemoryPlan):
    caches = {moment.what: moment.used[Part.TOKEN_CACHES] for moment in published.moments}
    filled = 3 * 25 * 576 * 2 * 2048 * 2  # three sub-layers, 25 layers, two rows, bf16
    assert [what for what, size in caches.items() if size] == ["scale 8, 24x24", "scale 9, 32x32", "scale 10, 40x40"]
    assert set(caches.values()) == {0, filled}


def test_nothing_of_the_scales_is_left_when_the_image_is_decoded(published: MemoryPlan):
    decoder = published.moments[-1]
    assert decoder.what == "decoder"
    assert not any(decoder.used[part] for part in (Part.KEYS, Part.TEXT_KEYS, Part.TOKEN_CACHES))


def test_offloaded_text_encoder_is_there_for_the_text_alone():
    plan = memory_plan(described("256x256", "dense", guidance="on"), offload_text_encoder=True)
    there = [moment.what for moment in plan.moments if moment.used[Part.TEXT_ENCODER]]
    assert there == ["text"]


def test_weights_are_those_of_the_model(published: MemoryPlan):
    used = published.moments[0].used
    assert used[Part.TEXT_ENCODER] / GIB == pytest.approx(2.28, abs=0.01)  # flan-t5-xl's encoder in bf16
    assert used[Part.WEIGHTS] / GIB == pytest.approx(4.30, abs=0.01)


def test_fewer_guidance_rows_take_less(published: MemoryPlan):
    one = memory_plan(described("1024x1024", "fastvar", guidance="off"))
    assert one.rows == 1
    assert 2 * one.moments[-2].used[Part.KEYS] == published.moments[-2].used[Part.KEYS]


def test_a_tiled_decoder_is_planned_with_its_stripes():
    tiled = memory_plan(described("512x512", "fastvar", guidance="on", decoder_tile=8))
    assert tiled.moments[-1].used[Part.DECODER] > 2 * 512 * 512 * 128 * 2  # two activations of the image's size


def test_every_slot_has_its_part():
    names = {
        "keys.3": Part.KEYS,
        "text_keys.3": Part.TEXT_KEYS,
        "cache_sa.4": Part.TOKEN_CACHES,
        "x0": Part.ACTIVATIONS,
    }
    assert {name: part_of(name) for name in names} == names


@pytest.mark.slow
def test_memory_on_the_cpu_is_told_beforehand(tmp_path: Path, engine_cache: Path):
    """Peak growth of a fresh process that loads the demo and draws one image, within 10 %."""
    out = tmp_path / "demo"
    build(CHECKPOINT, size="256x256", policy="fastvar", guidance="on", out=out, sampling=SAMPLING, cache=engine_cache)
    manifest = Bundle.open(out).manifest
    planned = total_need(manifest, [build_layout(manifest, 2)], on_host=True).total_bytes
    recording = memory_run_apart(out, Request()).recording
    measured = recording.peak_bytes - recording.before_bytes
    assert planned == pytest.approx(measured, rel=0.10)


def test_the_plan_follows_the_reports_of_engines_that_are_compiled():
    manifest = described("256x256", "fastvar", guidance="on")
    name = manifest.sets[0].steps[-1].attn_mlp_pruned
    spec = manifest.engines[name]
    greedy = replace(spec, report=replace(spec.report, scratch_bytes=1 << 30))
    more = memory_plan(replace(manifest, engines={**manifest.engines, name: greedy}))
    assert more.need.arena_bytes - memory_plan(manifest).need.arena_bytes == pytest.approx(1 << 30, rel=0.03)
    assert more.peak.what.startswith("scale 6")
