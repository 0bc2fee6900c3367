"""A manifest with one wrong leaf: an error in words, or the image that is right; nothing else, ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fastvar import Pipeline
from tests.mutations import ERROR, OTHER, REMOVED, SAME, Mutation, leaves, mutations, outcome, sampled, sealed

PROMPT = "a red circle"
SHORT, LONG = 250, 6000


def draw(folder: Path) -> bytes:
    return Pipeline.load(folder)(PROMPT, seed=7).images[0].tobytes()


@pytest.fixture(scope="module")
def right(tiny_bundle: Path) -> bytes:
    return draw(tiny_bundle)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def manifest_of(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "manifest.json").read_text())


@pytest.mark.parametrize(
    "count", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)
def test_of_any_leaf_the_checksum_as_it_was(bundle: Path, right: bytes, count: int):
    manifest = manifest_of(bundle)
    for mutation in sampled(manifest, count):
        assert outcome(bundle, mutation.applied_to(manifest), draw, right) in (ERROR, SAME), str(mutation)


@pytest.mark.parametrize(
    "count", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.slow)]
)
def test_of_any_leaf_by_somebody_who_mends_the_checksum(bundle: Path, right: bytes, count: int):
    """What still makes sense may draw another image; whatever does not is told in words."""
    manifest = manifest_of(bundle)
    found = [outcome(bundle, sealed(m.applied_to(manifest)), draw, right) for m in sampled(manifest, count, seed=1)]
    assert found.count(ERROR) > len(found) * 0.9
    assert SAME in found


@pytest.mark.parametrize("name", ["plan", "sampling", "prompt_format", "transformer", "text_length", "precision"])
def test_of_what_is_no_engine_by_somebody_who_mends_the_checksum(bundle: Path, right: bytes, name: str):
    manifest = manifest_of(bundle)
    own = [m for m in mutations(manifest, akin=1) if m.path[0] == name]
    for mutation in own[:: max(1, len(own) // 40)]:
        outcome(bundle, sealed(mutation.applied_to(manifest)), draw, right)


def test_a_change_that_makes_sense_is_another_image_without_its_checksum(bundle: Path, right: bytes):
    manifest = manifest_of(bundle)
    layers = Mutation(("plan", "policy", "layers", 0), 0).applied_to(manifest)
    assert outcome(bundle, layers, draw, right) == ERROR
    assert outcome(bundle, sealed(layers), draw, right) == OTHER


def test_every_leaf_is_found_and_every_mutation_is_of_one():
    document = {"a": [1, {"b": "x"}], "c": {}, "d": None}
    assert list(leaves(document)) == [(("a", 0), 1), (("a", 1, "b"), "x"), (("c",), {}), (("d",), None)]
    made = list(mutations(document))
    assert {mutation.path for mutation in made} == {path for path, _ in leaves(document)}
    assert all(json.dumps(mutation.applied_to(document)) != json.dumps(document) for mutation in made)
    assert "d" not in Mutation(("d",), REMOVED).applied_to(document)
    assert document == {"a": [1, {"b": "x"}], "c": {}, "d": None}
    assert len({str(m) for m in sampled(document, 4)}) == 4
    assert {mutation.path for mutation in sampled(document, 4)} == {path for path, _ in leaves(document)}
