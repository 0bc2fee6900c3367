"""Engines that are loaded ahead: those of the pass that was named, once, and what is drawn afterwards is the same."""

from __future__ import annotations

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.errors import InputError


def test_a_warm_pipeline_loads_nothing_more(batched_bundle):
    with Pipeline.load(batched_bundle) as cold, Pipeline.load(batched_bundle) as warm:
        expected = cold("a red circle", guidance_scale=3.0, seed=1).images[0]
        assert warm._session.engines.loaded == 0
        warm.warm_up(guidance_scale=3.0)
        loaded = warm._session.engines.loaded
        assert loaded == cold._session.engines.loaded > 0
        drawn = warm("a red circle", guidance_scale=3.0, seed=1).images[0]
        assert warm._session.engines.loaded == loaded
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))


def test_each_pass_has_engines_of_its_own(batched_bundle):
    with Pipeline.load(batched_bundle) as pipe:
        counts = []
        for images, scale in ((1, 3.0), (4, 3.0), (4, 1.0), (1, 3.0)):
            pipe.warm_up(images, guidance_scale=scale)
            counts.append(pipe._session.engines.loaded)
        assert counts[0] < counts[1] < counts[2] == counts[3]


@pytest.mark.parametrize(("images", "scale"), [(3, None), (0, None), (True, None), (1, "much")])
def test_no_such_pass(batched_bundle, images: object, scale: object):
    with Pipeline.load(batched_bundle) as pipe, pytest.raises(InputError):
        pipe.warm_up(images, guidance_scale=scale)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(InputError, match="closed"):
        pipe.warm_up()
