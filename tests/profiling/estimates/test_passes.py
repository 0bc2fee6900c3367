"""Passes of a bundle: launches counted from the layout, and what a session takes to load up to each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastvar.core.policy import DENSE
from fastvar.core.precision import Precision
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.registry import backend_class
from fastvar.export.describe import describe
from fastvar.export.options import BuildOptions
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity_presets import schedule_for
from fastvar.profiling.estimates.memory_plan import memory_plan
from fastvar.profiling.estimates.passes import largest_that_fits, pass_launches, passes_of
from fastvar.runtime.memory.layout import build_layout
from fastvar.runtime.session import Session

SCALES, LAYERS = 7, 2


@pytest.fixture
def described(tiny_checkpoint) -> Manifest:
    """The tiny model, dense, with its text encoder."""
    plan = INFINITY.plan(schedule_for((256, 256)), DENSE, tiny_checkpoint.transformer)
    options = BuildOptions(guidance="both", batch=(2, 4))
    return describe(tiny_checkpoint, plan, backend_class("tensorrt-rtx"), Precision(), options)


def test_a_pass_launches_scales_once_and_texts_and_decoders_for_each_image(described: Manifest):
    of_layers = len(build_layout(described, 2).layer_conditioning)
    once = 1 + of_layers + SCALES * (2 * LAYERS + 1)  # two engines a layer, and the head
    for images in (1, 2, 4):
        found = pass_launches(described, build_layout(described, 2, images))
        assert (found.guidance_rows, found.images) == (2, images)
        assert found.engines == once + 2 * images
        assert found.recorded == 1 + SCALES + 2 * images
        assert found.engines_an_image == once / images + 2
        assert found.recorded_an_image == (1 + SCALES) / images + 2
        assert found.kernels is None, "nothing has been compiled"


def test_kernels_are_those_that_the_compiler_reported(described: Manifest):
    engines = {n: replace(e, report=replace(e.report, kernels=3)) for n, e in described.engines.items()}
    compiled = replace(described, engines=engines)
    found = pass_launches(compiled, build_layout(compiled, 2, 4))
    assert found.kernels == 3 * found.engines


def test_the_plan_has_those_of_every_pass(described: Manifest):
    found = memory_plan(described).launches
    assert [(own.guidance_rows, own.images) for own in found] == [(2, 1), (1, 1), (2, 2), (1, 2), (2, 4), (1, 4)]


def test_a_session_is_loaded_for_what_fits(batched_bundle: Path):
    """What is told of each number of images is what a session needs, to the byte."""
    opened = Bundle.open(batched_bundle)
    passes = passes_of(opened.manifest)
    assert [own.images for own in passes] == [1, 2, 4]
    assert all(own.guidance_rows == (2, 1) for own in passes)
    assert [own.activation_bytes[0] for own in passes] == sorted(own.activation_bytes[0] for own in passes)
    for own in passes:
        total = own.need.total_bytes
        assert Session(opened, memory_budget=total).batch_sizes(2)[-1] == own.images
        assert largest_that_fits(passes, total) == own.images
    assert largest_that_fits(passes, passes[0].need.total_bytes - 1) == 0
