"""Engines kept between builds, by what went into them.

An entry is `<key>.json`, which names tensors and digest, beside `<digest>.engine`. Both are written under a
temporary name and renamed, the JSON last, so processes can share the folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...core.files import write_whole
from ...errors import BundleError
from ..spec import EngineReport, TensorSpec
from .lock import FolderLock

KERNELS = "kernels"  # a folder: what a library compiles on the GPU and keeps from run to run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachedEngine:
    """Engine bytes, with the tensors that the engine takes and gives, and its compiler's report."""

    engine: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    report: EngineReport = field(default_factory=EngineReport)


class EngineCache:
    """A folder of engines; $FASTVAR_CACHE, $XDG_CACHE_HOME/fastvar or ~/.cache/fastvar by default.

    The cache only saves time: what cannot be read or written is logged as a warning and built anew.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()

    @staticmethod
    def key(graph: str, backend: str, target: str, stamp: str) -> str:
        """Name of an entry.

        Args:
            graph: all that decides the graph: its builder with its source, sizes and options.
            stamp: what the backend makes engines with, its own source included (`Backend.stamp`).
        """
        parts = [graph, backend, target, stamp]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def get(self, key: str) -> CachedEngine | None:
        """The engine, or None where there is none that is whole. A damaged entry is dropped."""
        entry = self._entry(key)
        try:
            data = json.loads(entry.read_bytes())
            engine_file = self._engine(str(data["sha256"]))
            engine = engine_file.read_bytes()
            found = hashlib.sha256(engine).hexdigest()
            if found != data["sha256"]:
                engine_file.unlink(missing_ok=True)
                raise ValueError(f"sha256 is {found}, expected {data['sha256']}")
            report = EngineReport(**data["report"])
            found_engine = CachedEngine(engine, _specs(data["inputs"]), _specs(data["outputs"]), report)
            _note_use(entry, engine_file)
            return found_engine
        except FileNotFoundError as error:
            if error.filename == str(entry):
                return None
            self._drop(entry, error)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self._drop(entry, error)
        return None

    def put(self, key: str, engine: CachedEngine) -> None:
        """Keep an engine."""
        digest = hashlib.sha256(engine.engine).hexdigest()
        entry = {
            "sha256": digest,
            "inputs": [asdict(spec) for spec in engine.inputs],
            "outputs": [asdict(spec) for spec in engine.outputs],
            "report": asdict(engine.report),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._engine(digest), engine.engine)
            write_whole(self._entry(key), json.dumps(entry).encode())
        except OSError as error:
            _log.warning("engine cache %s cannot be written: %s", self.folder, error.strerror)

    def _entry(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _engine(self, digest: str) -> Path:
        if not digest.isalnum():
            raise ValueError(f"{digest!r} is no digest")
        return self.folder / f"{digest}.engine"

    def _drop(self, entry: Path, error: Exception) -> None:
        _log.warning("engine cache entry %s is damaged and will be built anew: %s", entry, error)
        try:
            entry.unlink(missing_ok=True)
        except OSError as failure:
            _log.warning("%s cannot be removed: %s", entry, failure.strerror)


def _note_use(*files: Path) -> None:
    """By the time of change, which says what was used last: times of reading are often switched off."""
    for file in files:
        with suppress(OSError):
            os.utime(file)


def default_folder() -> Path:
    """Where engines are kept unless the caller says."""
    if chosen := os.environ.get("FASTVAR_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastvar"


def read_shared(path: Path) -> bytes:
    """A file that `save_shared` wrote; empty where there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        _log.warning("%s cannot be read: %s", path, error.strerror)
        return b""


def save_shared(path: Path, data: bytes) -> None:
    """Replace a file that only saves time and that several processes write: whole, under a lock, or not at all."""
    lock = FolderLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        _log.warning("%s cannot be written: %s", path, error.strerror)
        return
    except BundleError as error:  # another process is saving, or the folder is read-only
        _log.warning("%s is not saved: %s", path, error.problem)
        return
    try:
        write_whole(path, data)
    except OSError as error:
        _log.warning("%s cannot be written: %s", path, error.strerror)
    finally:
        lock.release()


def _specs(data: list[dict[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in data)
