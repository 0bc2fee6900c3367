"""Manifests of the format before are read, with a warning; entries of two formats in one manifest are not."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import FORMAT_VERSION, Manifest, manifest_from_json, manifest_to_json
from fastvar.engines.bundle.renamed import OLD_FORMAT, RENAMED
from fastvar.errors import BundleError, RenamedWarning
from tests.models.small_bundle import make_bundle


def as_before(value: Any, place: tuple[str, ...] = ()) -> Any:
    """A manifest in the words of format 4."""
    if isinstance(value, list):
        return [as_before(one, (*place, "*")) for one in value]
    if not isinstance(value, dict):
        return value
    names = {new: old for old, new in RENAMED.get(place, {}).items()}
    return {names.get(name, name): as_before(one, (*place, names.get(name, name))) for name, one in value.items()}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    make_bundle(tmp_path / "b")
    return Bundle.open(tmp_path / "b").manifest


def old(manifest: Manifest) -> dict[str, Any]:
    data: dict[str, Any] = as_before(json.loads(json.dumps(manifest_to_json(manifest))))
    return data | {"format_version": OLD_FORMAT}


def test_a_manifest_of_the_format_before_says_the_same(manifest: Manifest):
    data = old(manifest)
    assert "cached_scale" in data["plan"]["policy"]
    assert "bridge" in data["sets"][0]["steps"][0]
    with pytest.warns(
        RenamedWarning, match=f"format version 4: the next version of fastvar reads {FORMAT_VERSION} alone"
    ):
        assert manifest_from_json(data) == manifest


def test_a_manifest_of_today_warns_of_nothing(manifest: Manifest):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert manifest_from_json(json.loads(json.dumps(manifest_to_json(manifest)))) == manifest


def test_every_name_of_the_format_before_is_in_use(manifest: Manifest):
    """None of the table is there for nothing."""

    def names(value: Any, place: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
        if isinstance(value, list):
            return set().union(*(names(one, (*place, "*")) for one in value))
        if not isinstance(value, dict):
            return set()
        return {(*place, name) for name in value}.union(*(names(one, (*place, name)) for name, one in value.items()))

    found = names(old(manifest))
    image_tokenizer_scales = ("image_tokenizer", "levels")  # of families with a codebook
    assert {(*place, name) for place, table in RENAMED.items() for name in table} - found <= {image_tokenizer_scales}


def test_old_words_in_a_manifest_of_today_are_refused(manifest: Manifest):
    with pytest.raises(BundleError, match=r"manifest\.json is not understood"):
        manifest_from_json(old(manifest) | {"format_version": FORMAT_VERSION})
