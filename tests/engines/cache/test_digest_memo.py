"""Large weights are hashed once, and again when they change."""

import os
from pathlib import Path

import pytest

from fastvar.engines.bundle import bundle as bundle_module
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.cache import digest_memo as memo_module
from fastvar.engines.cache.digest_memo import MEMO
from fastvar.errors import BundleError
from tests.models.small_bundle import make_bundle


@pytest.fixture
def hashed(tmp_path, monkeypatch) -> list[str]:
    """Names of files that the memo had to hash; weights count as large, and as settled."""
    monkeypatch.setenv("FASTVAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle_module, "HASHED_WEIGHTS_BYTES", 16)
    monkeypatch.setattr(memo_module, "SETTLED_NS", -(1 << 62))
    names: list[str] = []
    real = memo_module.digest_of_file

    def counting(handle):
        names.append(Path(handle.name).name)
        return real(handle)

    monkeypatch.setattr(memo_module, "digest_of_file", counting)
    return names


def test_once_a_machine_and_not_at_all_by_default(tmp_path, hashed):
    make_bundle(tmp_path / "b")
    Bundle.open(tmp_path / "b")
    assert hashed == []
    for _ in range(3):
        Bundle.open(tmp_path / "b", verify="all")
    assert hashed == ["weights.safetensors"]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_changed_file_is_hashed_again(tmp_path, hashed):
    make_bundle(tmp_path / "b")
    weights = tmp_path / "b" / "weights.safetensors"
    Bundle.open(tmp_path / "b", verify="all")
    _flip(weights)
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1_000_000))
    for _ in range(2):
        with pytest.raises(BundleError, match="is damaged"):
            Bundle.open(tmp_path / "b", verify="all")
    assert len(hashed) == 3, "what is damaged is not remembered"


def test_another_file_under_the_same_name_is_hashed_again(tmp_path, hashed):
    make_bundle(tmp_path / "b")
    weights = tmp_path / "b" / "weights.safetensors"
    Bundle.open(tmp_path / "b", verify="all")
    times = weights.stat()
    copy = tmp_path / "copy"
    copy.write_bytes(weights.read_bytes())
    _flip(copy)
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    copy.replace(weights)
    with pytest.raises(BundleError, match="is damaged"):
        Bundle.open(tmp_path / "b", verify="all")


def test_a_file_that_was_changed_just_now_is_not_remembered(tmp_path, hashed, monkeypatch):
    """It may change again within the clock's grain."""
    monkeypatch.setattr(memo_module, "SETTLED_NS", 1 << 62)
    make_bundle(tmp_path / "b")
    for _ in range(2):
        Bundle.open(tmp_path / "b", verify="all")
    assert len(hashed) == 2


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"a": 3}', b"\xff", b"[" * 100_000])
def test_a_damaged_memo_costs_time_only(tmp_path, hashed, caplog, text):
    make_bundle(tmp_path / "b")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / MEMO).write_bytes(text)
    for _ in range(2):
        Bundle.open(tmp_path / "b", verify="all")
    assert "is damaged and will be made anew" in caplog.text
    assert len(hashed) == 1


def test_the_memo_does_not_grow_without_end(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(memo_module, "MOST_ENTRIES", 2)
    for name in "abc":
        make_bundle(tmp_path / name)
        Bundle.open(tmp_path / name, verify="all")
    for name in "bc":
        Bundle.open(tmp_path / name, verify="all")
    assert len(hashed) == 3
    Bundle.open(tmp_path / "a", verify="all")
    assert len(hashed) == 4
