"""A short soak: `tests/soak.py` draws longer ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak import KINDS, soak


@pytest.mark.slow
def test_many_threads_draw_what_each_drawing_gives_alone(tiny_bundle: Path):
    result = soak(tiny_bundle, images=60, threads=8, seed=1)
    assert (result["errors"], result["differing"], result["alive"]) == ([], [], 0)
    assert result["images"] == 60
    assert result["kinds"].keys() == KINDS.keys(), "every kind was met"
