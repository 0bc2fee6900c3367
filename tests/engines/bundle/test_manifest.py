import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.core.precision import Precision
from fastvar.engines.bundle.manifest import (
    FORMAT_VERSION,
    DecoderStage,
    DecoderTiles,
    FileRecord,
    SamplingDefaults,
    manifest_from_json,
    manifest_to_json,
)
from fastvar.engines.spec import EngineSpec, TensorSpec
from fastvar.errors import BundleError
from tests.models.small_bundle import make_bundle

TEXT = st.text(max_size=12)
TENSOR = st.builds(TensorSpec, TEXT, TEXT, st.lists(st.integers(0, 1 << 40), max_size=4).map(tuple))
TENSORS = st.lists(TENSOR, max_size=3).map(tuple)
ENGINE = st.builds(
    EngineSpec, TEXT, TEXT, TEXT, st.integers(0), TENSORS, TENSORS, st.dictionaries(TEXT, TEXT), TEXT, TEXT, TEXT
)


STAGES = st.lists(st.builds(DecoderStage, TEXT, TEXT, TEXT), max_size=3).map(tuple)
TILES = st.builds(DecoderTiles, st.integers(1), st.integers(1), STAGES)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("manifest") / "bundle")


@settings(max_examples=20, deadline=None)
@given(
    engines=st.dictionaries(TEXT, ENGINE, max_size=3),
    tokenizer=st.none() | st.builds(FileRecord, TEXT, TEXT, st.integers(0)),
    sampling=st.builds(SamplingDefaults, *[st.floats(allow_nan=False, allow_infinity=False)] * 3),
    text=TEXT,
    tiles=st.none() | TILES,
    precision=st.sampled_from([Precision(), Precision("float16", "int8"), Precision("bfloat16", "int8", "int8")]),
)
def test_json_round_trip(manifest, engines, tokenizer, sampling, text, tiles, precision):
    texts = {"model": text, "decoder": text, "origin": (text,)}
    changed = dataclasses.replace(
        manifest,
        engines=engines,
        text_tokenizer=tokenizer,
        sampling=sampling,
        tiles=tiles,
        precision=precision,
        **texts,
    )
    assert manifest_from_json(json.loads(json.dumps(manifest_to_json(changed)))) == changed


@pytest.mark.parametrize(
    ("version", "age", "fix"),
    [(FORMAT_VERSION + 1, "newer", "update fastvar"), (0, "older", "rebuild"), (None, "older", "rebuild")],
)
def test_other_format_versions(manifest, version, age, fix):
    with pytest.raises(BundleError, match=age) as caught:
        manifest_from_json({**manifest_to_json(manifest), "format_version": version})
    assert fix in caught.value.fix


@pytest.mark.parametrize("name", ["engines", "plan", "weights", "sets", "transformer", "family"])
def test_missing_fields(manifest, name):
    data = json.loads(json.dumps(manifest_to_json(manifest)))
    del data[name]
    with pytest.raises(BundleError, match=name):
        manifest_from_json(data)


def test_engine_set_for_other_guidance(manifest):
    assert manifest.engine_set(2).rows == 2
    with pytest.raises(BundleError, match="no engines for 1 guidance row"):
        manifest.engine_set(1)
