"""Rounds of contenders in turn: taken from the journal where they are there, and one that fails leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import timing
from benchmarks.gpu.identity import Identity
from benchmarks.gpu.journal import Journal, Measuring
from benchmarks.gpu.rounds import image_rounds, medians, ratio_of
from benchmarks.gpu.sections import Context


class Stopwatch:
    """Takes its time for every scale; may fail at an image."""

    def __init__(self, ms: float, log: list[float], fails_at: int | None = None) -> None:
        self.ms, self.log, self.fails_at, self.images = ms, log, fails_at, 0

    def text(self) -> float:
        return 1.0

    def scales(self, noise) -> list[float]:
        self.log.append(self.ms)
        self.images += 1
        if self.images == self.fails_at:
            raise RuntimeError("out of memory")
        return [self.ms, 2 * self.ms]

    def decode(self) -> float:
        return 5.0


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    monkeypatch.setattr(timing, "come_to_rest", lambda: None)
    log = Measuring(Journal(tmp_path / "journal.jsonl"), "eager", "d", [])
    return Context(tmp_path, Identity("a GPU", "sm90", "", False, "tiny"), log)


def test_in_turn_behind_a_round_that_warms_up(context: Context):
    log: list[float] = []
    rounds = image_rounds(context, 3, {"slow": lambda: Stopwatch(4, log), "fast": lambda: Stopwatch(1, log)})
    assert log == [4, 1] * 4
    assert [line["name"] for line in context.log.journal.lines()] == [
        f"round {number} of slow, fast" for number in range(3)
    ]
    found = medians(rounds)
    assert found["slow"] == {"rounds": 3, "text_ms": 1, "scales_ms": 12, "scale_ms": [4, 8], "decode_ms": 5}
    assert vars(ratio_of(rounds, "slow", "fast")) == {"median": 4, "min": 4, "max": 4, "rounds": 3}
    assert [each["fast"]["decode_ms"] for each in rounds] == [5, 5, None]


def test_rounds_of_the_journal_are_not_played_again(context: Context):
    image_rounds(context, 2, {"a": lambda: Stopwatch(1, [])})
    assert len(image_rounds(context, 2, {"a": lambda: pytest.fail("opened")})) == 2
    log: list[float] = []
    rounds = image_rounds(context, 3, {"a": lambda: Stopwatch(7, log)})
    assert log == [7, 7], "it warms up, and plays the round that is missing"
    assert [each["a"]["scales_ms"] for each in rounds] == [3, 3, 21]
    both = image_rounds(context, 1, {"a": lambda: Stopwatch(1, []), "b": lambda: Stopwatch(2, [])})
    assert list(both[0]) == ["a", "b"], "rounds of others are other rounds"


def test_one_that_fails_leaves_and_the_others_go_on(context: Context):
    def fail():
        raise RuntimeError("no engines")

    openers = {"a": lambda: Stopwatch(1, []), "b": lambda: Stopwatch(2, [], fails_at=3), "c": fail}
    rounds = image_rounds(context, 3, openers)
    assert [list(each) for each in rounds] == [["a", "b"], ["a"], ["a"]]
    assert context.log.failed == ["c, opening", "b, round 1"]
    assert [line["error"] for line in context.log.journal.lines() if "error" in line] == [
        "RuntimeError: no engines",
        "RuntimeError: out of memory",
    ]
    assert ratio_of(rounds, "b", "a").rounds == 1
    with pytest.raises(ValueError, match="no round"):
        ratio_of(rounds, "c", "a")


def test_none_left(context: Context):
    assert image_rounds(context, 1, {"a": lambda: Stopwatch(1, [], fails_at=1)}) == []
    assert context.log.failed == ["a, warming up", "round 0 of a"]


def test_who_computes_something_else_is_not_timed():
    from benchmarks.gpu.measured.against_eager import is_timed

    assert is_timed({"ok": True}, stand_in=False)
    assert not is_timed({"ok": False}, stand_in=False)
    assert not is_timed(None, stand_in=False), "it could not be compared"
    assert is_timed(None, stand_in=True), "a rehearsal goes all the way"
