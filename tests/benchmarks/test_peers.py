"""What else the machine does: read from the system, and told apart from our own work."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers import MOST_OF_OTHERS, Watch, busy_seconds, disturbed, share_of_others

SECOND = 100  # ticks


def stat(path: Path, user: int, idle: int, waiting: int) -> Path:
    path.write_text(f"cpu  {user} 0 {SECOND} {idle} {waiting} 0 0 0 {user} 0\ncpu0 1 2 3\n")
    return path


def test_busy_is_all_but_idle_and_guests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.peers.os.sysconf", lambda _: SECOND)
    assert busy_seconds(stat(tmp_path / "stat", 5 * SECOND, 70 * SECOND, 9 * SECOND)) == 6


@pytest.mark.parametrize("text", ["", "intr 1 2", "cpu a b c d e f g h"])
def test_what_is_not_understood_is_not_known(tmp_path: Path, text: str):
    (tmp_path / "stat").write_text(text)
    assert busy_seconds(tmp_path / "stat") is None
    assert busy_seconds(tmp_path / "missing") is None


def test_the_share_of_others():
    assert share_of_others(10.0, 8.0, 100.0, 113.0, 2) == pytest.approx(0.25)
    assert share_of_others(10.0, 8.0, 100.0, 107.0, 2) == 0, "counted in coarse ticks"
    assert share_of_others(10.0, 0.0, 100.0, 190.0, 2) == 1
    assert share_of_others(10.0, 8.0, None, 107.0, 2) is None


def test_a_watch_tells_of_this_machine():
    with Watch() as watch:
        sum(range(10**6))
    assert watch.found.share is None or 0 <= watch.found.share <= 1
    assert watch.found.load is None or watch.found.load >= 0


def test_a_tenth_of_the_cores_is_too_much():
    assert MOST_OF_OTHERS == 0.1
    assert [disturbed(share) for share in (None, 0.0, 0.1)] == [""] * 3
    told = disturbed(0.37)
    assert "37%" in told
    assert "no ratios" in told
    assert "CPU seconds" in told
