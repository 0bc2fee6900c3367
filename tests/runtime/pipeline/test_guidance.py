"""Guidance on, off, and of a negative prompt; bundles that were built for one of the ways alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import BundleError, InputError
from tests.runtime.pipeline.drawing import PROMPT, SCALES, codes, previews


def test_one_row_equals_two_rows_at_guidance_1(pipe: Pipeline):
    """The unconditional row counts for nothing there: leaving it out must not change a bit."""
    for one, two in zip(codes(pipe, 1, 1.0), codes(pipe, 2, 1.0), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_guidance_1_runs_the_one_row_engines(tiny_bundle: Path):
    pipe = Pipeline.load(tiny_bundle)
    for guidance_scale in (1, 1.0):
        next(pipe.stream(PROMPT, guidance_scale=guidance_scale))
    assert {batch: w.layout.rows for batch, w in pipe._session._workspaces.items()} == {(1, 1): 1}
    loaded = pipe._session.engines._loaded
    assert any(name.endswith("-r1") for name in loaded)
    assert not any("-r2" in name for name in loaded), "engines that are not needed are not loaded"
    for guidance_scale in (0.0, 3.0, None):
        next(pipe.stream(PROMPT, guidance_scale=guidance_scale))
    assert sorted(pipe._session._workspaces) == [(1, 1), (2, 1)]


def test_guidance_0_ignores_the_prompt(pipe: Pipeline):
    """Only the negative prompt is left then."""
    negative = {"guidance_scale": 0, "negative_prompt": "a white square"}
    assert previews(pipe, prompt="a red circle", **negative) == previews(pipe, prompt="a blue square", **negative)


def test_negative_prompt_equal_to_the_prompt_cancels_guidance(pipe: Pipeline):
    same = {"negative_prompt": PROMPT, "seed": 7}
    assert previews(pipe, guidance_scale=4.0, **same) == previews(pipe, guidance_scale=2.0, **same)


def test_negative_prompt_without_guidance_is_refused(pipe: Pipeline):
    with pytest.raises(InputError, match="no effect at guidance_scale 1") as error:
        pipe(PROMPT, guidance_scale=1, negative_prompt="a white square")
    assert "raise guidance_scale" in error.value.fix


def test_bundle_built_for_guidance_only(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle)
    sets = tuple(s for s in bundle.manifest.sets if s.rows == 2)
    pipe = Pipeline(replace(bundle, manifest=replace(bundle.manifest, sets=sets)))
    for draw in (pipe, pipe.stream):
        with pytest.raises(BundleError, match=r"^guidance_scale 1 switches guidance off, .* guidance only") as error:
            draw(PROMPT, guidance_scale=1)
        assert error.value.expected == "a guidance_scale other than 1"
        assert "--guidance both" in error.value.fix
    assert len(previews(pipe, guidance_scale=3)) == len(SCALES), "the other way still works"


def test_bundle_built_without_guidance(tiny_bundle: Path):
    bundle = Bundle.open(tiny_bundle)
    sets = tuple(s for s in bundle.manifest.sets if s.rows == 1)
    pipe = Pipeline(replace(bundle, manifest=replace(bundle.manifest, sets=sets)))
    for given, named in ((None, "guidance_scale 3, the default, draws"), (2, "guidance_scale 2 draws")):
        with pytest.raises(BundleError, match=named) as error:
            pipe(PROMPT, guidance_scale=given)
        assert "guidance_scale=1" in error.value.fix
    assert len(previews(pipe, guidance_scale=1)) == len(SCALES)
