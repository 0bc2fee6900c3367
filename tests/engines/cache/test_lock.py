"""Locks of folders: one holder at a time, who fails at once or waits."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from fastvar.engines.cache.lock import FolderLock
from fastvar.errors import BundleError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")


def test_one_holds_it_and_others_fail_or_wait(tmp_path: Path):
    first, second = FolderLock(tmp_path / "folder"), FolderLock(tmp_path / "folder")
    first.acquire()
    with pytest.raises(BundleError, match="another build into"):
        second.acquire()
    order: list[str] = []

    def wait() -> None:
        second.acquire(wait=True)
        order.append("taken")

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    order.append("given back")
    first.release()
    waiting.join(10)
    assert order == ["given back", "taken"]
    second.release()
    assert not list(tmp_path.iterdir())
