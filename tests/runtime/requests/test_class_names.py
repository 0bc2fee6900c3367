"""class_names.json in a bundle is a list of one text for each class, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastvar.engines.bundle.manifest import FileRecord
from fastvar.errors import BundleError
from fastvar.families.var import VarConfig
from fastvar.runtime.requests.inputs import ConditioningInputs

MODEL = VarConfig(depth=1, width=4, heads=1, mlp_width=4, classes=3, codes=8, code_channels=4)


def bundle(content: bytes) -> SimpleNamespace:
    record = FileRecord("class_names.json", "0" * 64, len(content))
    manifest = SimpleNamespace(
        family="var", transformer=MODEL, class_names=record, text_tokenizer=None, text_encoder=""
    )
    return SimpleNamespace(path=Path("bundle"), manifest=manifest, read={record: content}.__getitem__)


def test_names_with_their_synonyms():
    names = json.dumps(["tench, Tinca tinca", "goldfish", "héron"], ensure_ascii=False).encode()
    assert ConditioningInputs(bundle(names)).of(None, ["TINCA tinca", "héron", 1]) == [0, 2, 1]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"{}", b"3", b'"abc"', b"[]", b'["a", "b"]', b'["a", "b", "c", "d"]', b'["a", "b", 3]',
        b'["a", "b", null]', b'["a", "b", ["c"]]', b'["a", "b", "\xff"]', b"[" * 100_000,
    ],
)  # fmt: skip
def test_whatever_else_is_refused_when_the_bundle_is_loaded(content: bytes):
    with pytest.raises(BundleError, match=r"class_names\.json") as caught:
        ConditioningInputs(bundle(content))
    assert caught.value.fix
