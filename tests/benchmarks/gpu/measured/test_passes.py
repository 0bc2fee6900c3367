"""The section "batch" on a machine without a GPU: passes are timed, and compared with images alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import timing
from benchmarks.gpu import drawing
from benchmarks.gpu.drawing import Forced, forced
from benchmarks.gpu.identity import Identity
from benchmarks.gpu.journal import Journal, Measuring
from benchmarks.gpu.measured import passes
from benchmarks.gpu.recipes import BATCHED, BATCHES
from benchmarks.gpu.sections import BUNDLES, Context
from fastvar.engines.bundle.bundle import Bundle


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has processes of its own runs in this one, and no rest between images."""
    monkeypatch.setattr(timing, "come_to_rest", lambda: None)
    monkeypatch.setattr(passes, "run_apart", lambda _, function, *arguments: function(*arguments))
    monkeypatch.setattr(passes, "PRECISION", "fp32")
    monkeypatch.setitem(drawing.TOLERANCES, "fp32", 1e-5)


def measured(tmp_path: Path, bundle: Path) -> tuple[Measuring, dict[str, dict]]:
    (tmp_path / BUNDLES).mkdir()
    (tmp_path / BUNDLES / BATCHED).symlink_to(bundle)
    log = Measuring(Journal(tmp_path / "journal.jsonl"), "batch", "d", [])
    passes.measure(Context(tmp_path, Identity("a GPU", "sm90", "", False, "tiny"), log))
    return log, {line["name"]: line for line in log.journal.lines()}


def test_a_line_of_time_and_one_of_truth_for_each_batch(
    here: None, batched_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(passes, "BATCHES", (1, 2, 4))
    log, lines = measured(tmp_path, batched_bundle)
    assert not log.failed, lines
    assert list(lines) == ["1 in a pass", "2 in a pass", "4 in a pass", "2 against alone", "4 against alone"]
    for images in (1, 2, 4):
        found = lines[f"{images} in a pass"]["values"]
        assert found["images"] == images
        assert found["scales_ms_an_image"] == pytest.approx(found["scales_ms"] / images)
        assert found["launches"]["images"] == images
        assert found["decode_ms"] > 0
    assert lines["1 in a pass"]["values"]["planned_bytes"] < lines["4 in a pass"]["values"]["planned_bytes"]
    assert lines["4 against alone"]["values"]["ok"]


def test_an_image_that_is_another_is_seen(here: None, batched_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def wrong(bundle: Bundle, cuda_graphs: bool = True, images: int = 1) -> Forced:
        found = forced(bundle, cuda_graphs, images)
        if images > 1:  # the last image's logits come from the first token's
            for scale in found.logits:
                scale[images - 1 :: images] = scale[0] + 1
        return Forced([np.asarray(scale) for scale in found.logits], found.image)

    monkeypatch.setattr(passes, "forced", wrong)
    assert not passes.against_alone(batched_bundle, 2)["ok"]


def test_a_batch_that_is_missing_stops_no_other(here: None, batched_bundle: Path, tmp_path: Path):
    """The tiny bundle has no passes of eight."""
    log, lines = measured(tmp_path, batched_bundle)
    assert BATCHES == (1, 4, 8)
    assert log.failed == ["8 in a pass", "8 against alone"]
    assert "batch 8, and the bundle has engines for passes of 1, 2, 4" in lines["8 in a pass"]["error"]
    assert lines["4 against alone"]["values"]["ok"]
