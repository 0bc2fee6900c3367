"""A pipeline goes on drawing from the bundle that it opened, whatever becomes of the folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import fastvar
from fastvar import Pipeline
from fastvar.engines.bundle import bundle as bundle_module
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.files import read_checked
from fastvar.errors import BundleError
from fastvar.export.rebuild import rebuild
from tests.models.small_bundle import make_bundle

PROMPT = "a red circle"


def drawn(pipe: Pipeline, **options: object) -> bytes:
    return pipe(PROMPT, seed=7, **options).images[0].tobytes()


@pytest.fixture
def place(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "live"))


def test_another_policy_is_built_in_its_place(tiny_bundle: Path, place: Path, engine_cache: Path):
    pipe = Pipeline.load(place)
    rebuild(place, place, policy="dense", cache=engine_cache)
    assert drawn(pipe) == drawn(Pipeline.load(tiny_bundle))
    assert drawn(pipe, guidance_scale=1) == drawn(Pipeline.load(tiny_bundle), guidance_scale=1)
    assert drawn(Pipeline.load(place)) != drawn(pipe)


def test_another_models_weights_come_in_its_place(tiny_checkpoint, tiny_bundle: Path, place: Path, engine_cache: Path):
    pipe = Pipeline.load(place)
    options = {"size": "256x256", "policy": "dense", "guidance": "off", "precision": "fp16"}
    fastvar.build(tiny_checkpoint, out=place, cache=engine_cache, **options)
    assert drawn(pipe) == drawn(Pipeline.load(tiny_bundle))


def test_the_folder_is_removed(tiny_bundle: Path, place: Path):
    pipe = Pipeline.load(place)
    shutil.rmtree(place)
    assert drawn(pipe) == drawn(Pipeline.load(tiny_bundle))
    assert not place.exists()


def test_a_swap_while_a_bundle_is_opened_mixes_nothing(tmp_path, monkeypatch):
    """Every file between two swaps is of equal size: only what is asked twice tells them apart."""
    place = tmp_path / "b"
    make_bundle(place, b"first!", 1.0)
    monkeypatch.setattr(bundle_module, "HASHED_WEIGHTS_BYTES", 16)  # weights are known by their size alone
    monkeypatch.setattr(bundle_module, "_SWAP_SECONDS", 0)
    swaps = [(b"second", 2.0)]

    def swapping(root, record):
        data = read_checked(root, record)
        if swaps and record.file == "tokenizer.json":
            make_bundle(place, *swaps.pop())
        return data

    monkeypatch.setattr(bundle_module, "read_checked", swapping)
    opened = Bundle.open(place)
    assert opened.read_engine(opened.manifest.engines["linear"]) == b"second"
    np.testing.assert_array_equal(opened.weights["layer.0.w"], np.full((4, 4), 2.0))
    swaps += [(b"third!", 3.0), (b"fourth", 4.0)]
    with pytest.raises(BundleError, match="replaced again and again"):
        Bundle.open(place)


def test_a_swap_before_an_engine_is_read(tmp_path, monkeypatch):
    place = tmp_path / "b"
    make_bundle(place, b"first!", 1.0)
    monkeypatch.setattr(bundle_module, "_SWAP_SECONDS", 0)
    swaps = [(b"second engine", 2.0)]

    def swapping(root, record):
        if swaps:
            make_bundle(place, *swaps.pop())
        return read_checked(root, record)

    monkeypatch.setattr(bundle_module, "read_checked", swapping)
    opened = Bundle.open(place)
    assert opened.read_engine(opened.manifest.engines["linear"]) == b"second engine"
    np.testing.assert_array_equal(opened.weights["layer.0.w"], np.full((4, 4), 2.0))


def test_between_the_two_renames_of_a_swap(tmp_path, monkeypatch):
    make_bundle(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / ".b.replaced-123")
    monkeypatch.setattr(bundle_module.time, "sleep", lambda _: (tmp_path / ".b.replaced-123").rename(tmp_path / "b"))
    assert Bundle.open(tmp_path / "b").manifest.model == "small"
