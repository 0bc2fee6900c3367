"""On a fake GPU: one allocation of what was announced, refusals before it, and scratch memory beyond it."""

from __future__ import annotations

import gc
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fastvar import Pipeline
from fastvar.core.dtypes import human_bytes
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import DeviceMemoryError, PlanError
from fastvar.runtime.memory.layout import build_layout
from fastvar.runtime.session import Session
from tests.fakes.cuda import FakeDriver
from tests.fakes.tensorrt import FakeBackend, fake_gpu_bundle
from tests.runtime.gpu.drawing import PROMPT, SCALES, Load, needed, pixels

# Memory


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
def test_device_holds_exactly_what_was_announced(gpu_bundle: Path, load: Load, offload: bool):
    announced = needed(Bundle.open(gpu_bundle).manifest, offload)
    gpu, driver = load(gpu_bundle, FakeDriver(memory=announced), offload_text_encoder=offload)
    for guidance_scale in (1, 3):
        gpu(PROMPT, guidance_scale=guidance_scale)
        assert driver.allocated_bytes == announced
    assert driver.count["cuMemAlloc"] == 1


def test_offloading_takes_no_more(gpu_bundle: Path):
    manifest = Bundle.open(gpu_bundle).manifest
    assert needed(manifest, True) <= needed(manifest, False)


def test_all_is_freed_with_the_pipeline(gpu_bundle: Path, load: Load):
    gpu, driver = load(gpu_bundle)
    for guidance_scale in (1, 3):
        gpu(PROMPT, guidance_scale=guidance_scale)
    alive = driver.alive()
    gpu(PROMPT)
    assert driver.alive() == alive, "an image leaves nothing"
    assert alive["executables"] == 2 * (1 + SCALES + 1), "the condition, every scale, the image decoder"
    assert "graphs" not in alive
    del gpu
    gc.collect()
    assert driver.alive() == {}


def test_offloading_is_of_no_effect_on_the_cpu(cpu: Pipeline, tiny_bundle: Path):
    offloaded = Pipeline.load(tiny_bundle, offload_text_encoder=True)
    assert pixels(offloaded(PROMPT, seed=0).images) == pixels(cpu(PROMPT, seed=0).images)


def refused(load: Load, bundle: Path, free: int, **options: object) -> DeviceMemoryError:
    driver = FakeDriver(memory=free)
    with pytest.raises(DeviceMemoryError) as error:
        load(bundle, driver, **options)
    assert driver.count["cuMemAlloc"] == 0, "nothing is allocated"
    assert human_bytes(free) in error.value.problem
    return error.value


def test_one_byte_too_little_is_refused(gpu_bundle: Path, load: Load):
    announced = needed(Bundle.open(gpu_bundle).manifest)
    error = refused(load, gpu_bundle, announced - 1)
    assert f"needs {human_bytes(announced)}" in error.problem


@pytest.fixture(scope="module")
def roomy_scale(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder's weights fit where the engines of the scales work, so offloading saves all of them."""
    return fake_gpu_bundle(
        tiny_bundle,
        tmp_path_factory.mktemp("bundles") / "roomy",
        lambda n: 4_000_000 if n.startswith("attn_mlp") else 0,
    )


def test_too_little_memory_names_the_way_that_fits(cpu: Pipeline, roomy_scale: Path, load: Load):
    manifest = Bundle.open(roomy_scale).manifest
    whole, offloaded = needed(manifest), needed(manifest, True)
    assert offloaded < whole
    error = refused(load, roomy_scale, offloaded)
    assert f"load with offload_text_encoder=True (--offload-text-encoder): {human_bytes(offloaded)}" in error.fix
    gpu, _ = load(roomy_scale, FakeDriver(memory=offloaded), offload_text_encoder=True)
    assert pixels(gpu(PROMPT, seed=0).images) == pixels(cpu(PROMPT, seed=0).images), "and it does fit"


def test_too_little_memory_names_all_ways_that_fit(tiny_bundle: Path, tmp_path: Path, load: Load):
    """Engines with guidance want far more scratch memory here than those without."""
    bundle = fake_gpu_bundle(tiny_bundle, tmp_path / "bundle", lambda n: 4_000_000 if "-r2" in n else 0)
    error = refused(load, bundle, needed(Bundle.open(bundle).manifest, True))
    assert error.fix.count(":") == 2
    for way in ("--offload-text-encoder", "--guidance off"):
        assert way in error.fix


def test_too_little_memory_for_any_way(gpu_bundle: Path, load: Load):
    for offload in (False, True):
        error = refused(load, gpu_bundle, 1000, offload_text_encoder=offload)
        assert re.match("no option of this model fits: ", error.fix)


def test_a_budget_is_held_to_the_byte(cpu: Pipeline, gpu_bundle: Path, load: Load):
    """With memory to spare on the GPU; in bytes or in words."""
    announced = needed(Bundle.open(gpu_bundle).manifest)
    gpu, _ = load(gpu_bundle, memory_budget=announced)
    assert pixels(gpu(PROMPT, seed=0).images) == pixels(cpu(PROMPT, seed=0).images)
    driver = FakeDriver()
    with pytest.raises(DeviceMemoryError, match="are its budget"):
        load(gpu_bundle, driver, memory_budget=announced - 1)
    assert driver.count["cuMemAlloc"] == 0
    with pytest.raises(DeviceMemoryError):
        load(gpu_bundle, memory_budget="1KiB")
    with pytest.raises(PlanError, match="not understood"):
        load(gpu_bundle, memory_budget="lots")


def test_the_tighter_of_budget_and_free_memory_counts(gpu_bundle: Path, load: Load):
    announced = needed(Bundle.open(gpu_bundle).manifest)
    assert "are free" in refused(load, gpu_bundle, announced - 2, memory_budget=announced - 1).problem


def test_a_budget_counts_on_the_cpu_too(tiny_bundle: Path):
    with pytest.raises(
        DeviceMemoryError, match=r"weights, .* for drawing, .* for the library\), 16.0 MiB are its budget"
    ):
        Pipeline.load(tiny_bundle, memory_budget="16MiB")
    assert Pipeline.load(tiny_bundle, memory_budget="2GiB")(PROMPT).images


def test_way_that_is_taken_already_is_not_named(roomy_scale: Path, load: Load):
    offloaded = needed(Bundle.open(roomy_scale).manifest, True)
    assert "offload" not in refused(load, roomy_scale, offloaded - 1, offload_text_encoder=True).fix


# Scratch memory beyond what was announced


def test_engine_that_wants_more_scratch_gets_it_with_a_warning(
    cpu: Pipeline, tiny_bundle: Path, tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
):
    bundle = fake_gpu_bundle(
        tiny_bundle, tmp_path / "bundle", 1000, lambda n: 70_000 if n.startswith("attn_mlp") else 1000
    )
    gpu, driver = load(bundle)
    with caplog.at_level(logging.WARNING):
        assert pixels(gpu(PROMPT, seed=0).images) == pixels(cpu(PROMPT, seed=0).images)
    assert caplog.text.count("needs 70000 bytes of scratch memory, more than was planned") == 1
    assert driver.allocated_bytes == needed(Bundle.open(bundle).manifest) + 70_000


def test_engines_that_want_more_and_more_scratch_all_keep_theirs(
    cpu: Pipeline, tiny_bundle: Path, tmp_path: Path, load: Load
):
    """Each finds the last one's too small; what was recorded before must not work in memory that is freed."""
    manifest = Bundle.open(tiny_bundle).manifest
    order = list(dict.fromkeys(call.engine for s in (2, 1) for call in build_layout(manifest, s).calls()))
    bundle = fake_gpu_bundle(tiny_bundle, tmp_path / "bundle", 0, lambda n: 1000 * (1 + order.index(n)))
    gpu, _ = load(bundle)
    for guidance_scale in (3, 1, 3):
        drawn = gpu(PROMPT, guidance_scale=guidance_scale, seed=0).images
        assert pixels(drawn) == pixels(cpu(PROMPT, guidance_scale=guidance_scale, seed=0).images)


def test_bundle_without_guidance_takes_less(gpu_bundle: Path):
    bundle = Bundle.open(gpu_bundle)
    manifest = replace(bundle.manifest, sets=tuple(s for s in bundle.manifest.sets if s.rows == 1))
    backend = FakeBackend()
    session = Session(replace(bundle, manifest=manifest), backend=backend)
    session.workspace(1)
    assert backend.driver.allocated_bytes == needed(manifest) < needed(bundle.manifest)
