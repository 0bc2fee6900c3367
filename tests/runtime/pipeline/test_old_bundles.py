"""Bundles from before passes held several images, and from before entries were renamed, draw as they always did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastvar import Pipeline
from fastvar.engines.bundle.manifest_file import CHECKSUM
from fastvar.engines.bundle.renamed import OLD_FORMAT
from fastvar.errors import RenamedWarning
from tests.engines.bundle.test_renamed import as_before


def without_numbers_of_images(manifest: dict[str, Any]) -> dict[str, Any]:
    for own in manifest["sets"]:
        assert own.pop("images") == 1
    return manifest


def in_old_words(manifest: dict[str, Any]) -> dict[str, Any]:
    words: dict[str, Any] = as_before(without_numbers_of_images(manifest))
    return words | {"format_version": OLD_FORMAT}


@pytest.mark.filterwarnings(f"ignore::{RenamedWarning.__module__}.{RenamedWarning.__name__}")
@pytest.mark.parametrize("older", [without_numbers_of_images, in_old_words])
def test_they_draw_one_image_a_pass(tiny_bundle: Path, tmp_path: Path, older: Callable[..., dict[str, Any]]):
    old = shutil.copytree(tiny_bundle, tmp_path / "old")
    file = old / "manifest.json"
    manifest = older(json.loads(file.read_text()))
    del manifest[CHECKSUM]  # they had none
    file.write_text(json.dumps(manifest))
    asked: dict[str, Any] = {"guidance_scale": 3.0, "seed": [1, 2]}
    prompts = ["a red circle", "a blue square"]
    with Pipeline.load(tiny_bundle) as now, Pipeline.load(old) as before:
        assert before.batch_sizes == {"on": [1], "off": [1]}
        for own, expected in zip(before(prompts, **asked).images, now(prompts, **asked).images, strict=True):
            assert np.array_equal(np.asarray(own), np.asarray(expected))
