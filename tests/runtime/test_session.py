"""What a session decides before it allocates anything."""

import logging
from pathlib import Path

import pytest

from fastvar import Pipeline
from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend

PACKED = 1 << 20


def test_matrices_are_packed_where_there_is_room(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    wanted: list[bool] = []
    monkeypatch.setattr(OnnxRuntimeBackend, "packed_bytes", lambda *_: PACKED)
    monkeypatch.setattr(OnnxRuntimeBackend, "pack_weights", lambda _, packs: wanted.append(packs))
    caplog.set_level(logging.INFO)
    need = Pipeline.load(tiny_bundle).memory_need
    assert need.packed_bytes == PACKED
    for budget in (need.total_bytes + PACKED, need.total_bytes + PACKED - 1, need.total_bytes):
        assert Pipeline.load(tiny_bundle, memory_budget=budget).memory_need == need
    assert wanted == [True, True, False, False]
    assert caplog.text.count("1048576 bytes are not left to pack matrices") == 2
