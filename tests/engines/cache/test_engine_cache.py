import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.engines.cache.engine_cache import CachedEngine, EngineCache
from fastvar.engines.spec import TensorSpec

INPUTS = (TensorSpec("x", "float32", (3, 4)), TensorSpec("scalar", "bfloat16", ()))
OUTPUTS = (TensorSpec("y", "float32", (3, 4)),)
ENGINE = CachedEngine(b"engine bytes", INPUTS, OUTPUTS)


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache")


KEY = EngineCache.key("block 9", "onnxruntime", "cpu", "1.30.0")


def test_round_trip(cache):
    assert cache.get(KEY) is None
    cache.put(KEY, ENGINE)
    assert cache.get(KEY) == ENGINE
    assert EngineCache(cache.folder).get(KEY) == ENGINE
    assert cache.get(EngineCache.key("block 10", "onnxruntime", "cpu", "1.30.0")) is None


def test_everything_that_decides_an_engine_is_in_its_key():
    parts = ["block 9", "tensorrt", "sm86", "10.13"]
    keys = {EngineCache.key(*parts)}
    keys |= {EngineCache.key(*parts[:i], parts[i] + "'", *parts[i + 1 :]) for i in range(4)}
    keys.add(EngineCache.key("block 9t", "ensorrt", "sm86", "10.13"))
    assert len(keys) == 6


def _flip(path: Path) -> None:
    path.write_bytes(b"\0" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry, engine: _flip(engine),
        lambda entry, engine: engine.unlink(),
        lambda entry, engine: os.truncate(engine, 3),
        lambda entry, engine: _flip(entry),
        lambda entry, engine: os.truncate(entry, 0),
        lambda entry, engine: entry.write_text("{}"),
        lambda entry, engine: entry.write_text('{"sha256": "../../etc/passwd"}'),
        lambda entry, engine: entry.write_text("[]"),
    ],
)
def test_a_damaged_entry_is_dropped_with_a_warning_and_built_anew(cache, caplog, damage):
    cache.put(KEY, ENGINE)
    (engine,) = cache.folder.glob("*.engine")
    damage(cache.folder / f"{KEY}.json", engine)
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    assert "is damaged and will be built anew" in caplog.text
    caplog.clear()
    assert cache.get(KEY) is None
    assert caplog.text == ""
    cache.put(KEY, ENGINE)
    assert cache.get(KEY) == ENGINE


def test_equal_engines_share_a_file_and_nothing_temporary_stays(cache):
    cache.put(KEY, ENGINE)
    cache.put("other", ENGINE)
    assert sorted(p.suffix for p in cache.folder.iterdir()) == [".engine", ".json", ".json"]


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = EngineCache(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        cache.put(KEY, ENGINE)
        assert cache.get(KEY) is None
    assert "cannot be written" in caplog.text


def test_default_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    monkeypatch.delenv("FASTVAR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert EngineCache().folder == Path("/home/her/.cache/fastvar")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert EngineCache().folder == Path("/cache/fastvar")
    monkeypatch.setenv("FASTVAR_CACHE", "/engines")
    assert EngineCache().folder == Path("/engines")


_WRITER = """
import sys
from fastvar.engines.cache.engine_cache import CachedEngine, EngineCache
cache, mine = EngineCache(sys.argv[1]), sys.argv[2].encode() * 5000
for _ in range(60):
    cache.put("shared", CachedEngine(mine, (), ()))
    found = cache.get("shared")
    assert found is not None and len(set(found.engine)) == 1 and len(found.engine) == 5000
"""


def test_two_processes_writing_one_entry(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path), letter]) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
