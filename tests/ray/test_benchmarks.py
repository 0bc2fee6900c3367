"""What measures batches and Ray's own share of them, on little."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ray", reason="ray is not installed; `make test-ray` installs it")
pytestmark = pytest.mark.ray


def test_a_batch_is_compared_with_a_loop(batched_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    from benchmarks.serving import bulk

    monkeypatch.setattr(bulk, "held_out_captions", lambda count, _seed: ["blue"] * count)  # the tiny model reads little
    found = bulk.measure(batched_bundle, 12, 1)
    assert found["files"] == {"loop": 12, "batch": 12, "batch on ray": 12}
    assert found["equal_files"]
    assert found["equal_pixels"]
    assert all(rate > 0 for rate in found["of_the_loop"].values())


def test_shares_that_nothing_is_drawn_for(cluster, tmp_path: Path):
    from benchmarks.serving.front import shares

    found = shares(tmp_path, 8)
    assert found["images_a_share"] == 16
    assert found["shares_per_s"] > 0
    assert found["entry_bytes"] > 100
