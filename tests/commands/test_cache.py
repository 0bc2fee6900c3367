"""`fastvar cache`: what is kept, and what goes first."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from fastvar.engines.cache.contents import ABANDONED_SECONDS, contents, evict
from fastvar.engines.cache.engine_cache import CachedEngine, EngineCache

KEYS = [f"{n:064x}" for n in range(1, 6)]


def engine(n: int) -> CachedEngine:
    return CachedEngine(bytes([n]) * 1000, (), ())


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    """Five engines of some 1,100 bytes each, the first written longest ago."""
    kept = EngineCache(tmp_path / "cache")
    for n, key in enumerate(KEYS):
        kept.put(key, engine(n))
        for file in kept.folder.iterdir():
            if file.stat().st_mtime > time.time() - 100:
                os.utime(file, (n * 1000, n * 1000))
    return kept


def found(cache: EngineCache) -> list[int]:
    return [n for n, key in enumerate(KEYS) if (cache.folder / f"{key}.json").exists()]


def test_it_shows_folder_files_and_bytes(run, cache):
    code, out, err = run("cache", "--cache", cache.folder)
    assert (code, err) == (0, "")
    assert str(cache.folder) in out.replace("\n", "")
    assert "together" in out
    code, out, _ = run("cache", "--cache", cache.folder, "--json")
    facts = json.loads(out)
    assert facts["folder"] == str(cache.folder)
    assert facts["kept"]["files"] == 10
    assert facts["kept"]["bytes"] == sum(file.stat().st_size for file in cache.folder.iterdir())
    assert facts["removed"]["files"] == 0
    assert found(cache) == [0, 1, 2, 3, 4]


def test_what_was_not_used_for_longest_goes_first(run, cache):
    assert cache.get(KEYS[0]) == engine(0)  # used just now
    code, out, _ = run("cache", "--cache", cache.folder, "--max-size", "3.5KiB", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["kept"]["bytes"] <= 3.5 * 1024
    assert facts["removed"]["files"] == 4
    assert found(cache) == [0, 3, 4]
    assert cache.get(KEYS[3]) == engine(3)
    assert len(list(cache.folder.glob("*.engine"))) == 3


def test_an_engine_stays_as_long_as_one_of_its_entries_is_used(cache):
    cache.put("a" * 64, engine(0))
    os.utime(cache.folder / f"{KEYS[0]}.json", (0, 0))
    evict(cache.folder, 1500)
    assert cache.get("a" * 64) == engine(0)
    assert found(cache) == [0]


def test_clearing_removes_files_of_ours_alone(run, cache):
    folder = cache.folder
    (folder / "notes.json").write_text("mine")
    (folder / "kernels-0123456789abcdef").mkdir()
    (folder / "kernels-0123456789abcdef" / "libfastvar.a").write_bytes(b"ours")
    (folder / "kernels-0123456789abcdef" / "mine.txt").write_text("mine")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "rtx-sm86.kernels").write_bytes(b"ours")
    (folder / "mine").mkdir()
    (folder / "mine" / f"{KEYS[0]}.json").write_text("mine")
    (folder / f"{'f' * 64}.engine").symlink_to(folder / "notes.json")
    (folder / "digests.json").write_text("{}")
    (folder / ".writing-old").write_bytes(b"ours")
    os.utime(folder / ".writing-old", (0, 0))
    (folder / ".writing-new").write_bytes(b"of a process that runs")
    code, out, _ = run("cache", "--cache", folder, "--clear")
    assert code == 0
    assert "removed 14 files" in out
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    assert left == sorted([
        ".writing-new", "mine", f"mine/{KEYS[0]}.json", "kernels-0123456789abcdef",
        "kernels-0123456789abcdef/mine.txt", f"{'f' * 64}.engine", "notes.json",
    ])  # fmt: skip
    assert ABANDONED_SECONDS > 600


def test_a_folder_that_is_not_there_is_empty(run, tmp_path):
    for options in ((), ("--clear",), ("--max-size", "1GiB")):
        code, out, _ = run("cache", "--cache", tmp_path / "nowhere", "--json", *options)
        assert (code, json.loads(out)["kept"]["files"]) == (0, 0)
    assert not (tmp_path / "nowhere").exists()


def test_what_is_asked_wrongly_is_told_in_words(run, tmp_path):
    code, _, err = run("cache", "--clear", "--max-size", "1GiB")
    assert (code, "exclude each other" in err) == (2, True)
    code, _, err = run("cache", "--max-size", "much")
    assert (code, "memory 'much' not understood" in err) == (2, True)
    (tmp_path / "file").write_text("")
    code, _, err = run("cache", "--cache", tmp_path / "file")
    assert (code, "cannot read" in err) == (2, True)


def test_the_default_folder_is_the_builds(run, cache, monkeypatch):
    monkeypatch.setenv("FASTVAR_CACHE", str(cache.folder))
    assert json.loads(run("cache", "--json")[1])["kept"]["files"] == 10


def test_damaged_entries_are_told_and_go(cache):
    (cache.folder / f"{KEYS[0]}.json").write_text("[" * 100_000)
    (cache.folder / f"{KEYS[1]}.json").write_text('{"sha256": 3}')
    assert sum(len(item.files) for item in contents(cache.folder)) == 10
    evict(cache.folder, 0)
    assert list(cache.folder.iterdir()) == []


def test_builds_go_on_while_another_process_evicts(cache, caplog):
    """What is gone is made anew; nothing is raised, and no wrong engine comes back."""
    stop, failures = threading.Event(), []

    def build() -> None:
        try:
            while not stop.is_set():
                for n, key in enumerate(KEYS):
                    cache.put(key, engine(n))
                    if (kept := cache.get(key)) is not None and kept != engine(n):
                        failures.append(key)
        except Exception as error:  # noqa: BLE001 told by the main thread
            failures.append(repr(error))

    builder = threading.Thread(target=build)
    builder.start()
    try:
        for _ in range(50):
            evict(cache.folder, 2000)
    finally:
        stop.set()
        builder.join()
    assert failures == []
