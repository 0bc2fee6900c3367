"""Files are written whole, in the modes of the umask."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastvar.core.files import exchange, whole_file, write_whole
from tests.conftest import REPOSITORY
from tests.models.small_bundle import ROOT


def test_it_replaces_as_a_whole(tmp_path):
    write_whole(tmp_path / "f", b"old")
    write_whole(tmp_path / "f", b"new", sync=True)
    assert (tmp_path / "f").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path, failure):
    write_whole(tmp_path / "f", b"old")

    def fails() -> None:
        with whole_file(tmp_path / "f") as handle:
            handle.write(b"ne")
            raise failure

    with pytest.raises(failure):
        fails()
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


_WRITE = """
import os, sys
from pathlib import Path
os.umask(int(sys.argv[2], 8))
from fastvar.engines.cache.engine_cache import CachedEngine, EngineCache
from tests.models.small_bundle import make_bundle
make_bundle(Path(sys.argv[1]) / "b")
EngineCache(Path(sys.argv[1]) / "cache").put("a" * 64, CachedEngine(b"engine", (), ()))
"""


@pytest.mark.skipif(os.name == "nt", reason="no modes there")
@pytest.mark.parametrize("umask", ["0022", "0002", "0077"])
def test_bundles_and_caches_have_the_modes_of_the_umask(tmp_path, umask):
    subprocess.run([sys.executable, "-c", _WRITE, str(tmp_path), umask], check=True, cwd=ROOT)
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in found} > {
        "manifest.json",
        "weights.safetensors",
        "tokenizer.json",
        f"{'a' * 64}.json",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o666 & ~int(umask, 8)}


def test_nothing_here_reads_the_umask():
    """To read it is to change it, for all threads of the process."""
    sources = [*(REPOSITORY / "engines").glob("*.py"), *(REPOSITORY / "commands").glob("*.py")]
    assert sources
    assert not [path.name for path in sources if "os.umask" in path.read_text() or "mkstemp" in path.read_text()]


def test_two_folders_trade_places(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system cannot let two folders trade places")
    assert [path.name for folder in ("a", "b") for path in (tmp_path / folder).iterdir()] == ["b", "a"]


def test_nothing_trades_places_with_nothing(tmp_path: Path):
    (tmp_path / "a").mkdir()
    assert not exchange(tmp_path / "a", tmp_path / "none")
    assert (tmp_path / "a").is_dir()
