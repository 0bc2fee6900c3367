"""What `python -m benchmarks.capacity` writes, and what is committed of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.capacity import __main__ as capacity
from benchmarks.capacity.growth import Measured, grown
from benchmarks.capacity.simulation import Service

ROOT = Path(__file__).parents[3]


def test_times_are_measured_and_kept(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(capacity, "RATES", (1.0,))
    monkeypatch.setattr(capacity, "REPLICAS", (2,))
    page = tmp_path / "page.md"
    marks = (capacity.BEGIN, capacity.END, capacity.BEGIN_GROWTH, capacity.END_GROWTH)
    page.write_text("\n\n".join(("# Page", *marks, "End\n")))
    out = tmp_path / "out.json"
    arguments = ["capacity", "--bundle", str(tiny_bundle), "--rounds", "2", "--out", str(out), "--docs", str(page)]
    monkeypatch.setattr(sys, "argv", arguments)
    capacity.main()
    record = json.loads(out.read_text())
    assert len(record["measured"]["seconds"]["1"]) == 2
    assert record["chosen"][0]["replicas"] == 1
    assert "| 1 | 1 |" in page.read_text()
    assert page.read_text().endswith("End\n")
    monkeypatch.setattr(sys, "argv", ["capacity", "--times", str(out), "--out", str(out), "--p99", "0.000001"])
    capacity.main()
    again = json.loads(out.read_text())
    assert again["measured"]["seconds"] == record["measured"]["seconds"]
    assert again["chosen"][0]["replicas"] is None


def test_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["capacity", "--times", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="holds no times"):
        capacity.main()


def test_the_committed_plan_follows_from_its_times():
    """Any row of it can be had again: the simulation starts from the same dice."""
    record = json.loads((capacity.RESULTS / "capacity.json").read_text())
    service = Service({int(size): times for size, times in record["measured"]["seconds"].items()})
    assert record["images_per_s"] == pytest.approx(service.images_per_s)
    one = next(one for one in record["grown"] if one["replicas"] == 1)
    again = capacity.tried(capacity.Setting(one["rate"], 1, service, record["queue"]), 1)
    assert capacity.described(again, one["rate"]) == pytest.approx({k: v for k, v in one.items() if k != "share"})
    page = (ROOT / "docs" / "scale-out.md").read_text()
    assert capacity.table(record) in page
    assert capacity.growth_table(record, json.loads((capacity.RESULTS / "front.json").read_text())) in page


def test_what_replicas_ask_of_the_rest():
    measured = Measured(
        images_per_s=5.0,
        bundle_bytes=10**9,
        answer_bytes=10**6,
        requests_per_s=100.0,
        shares_per_s=50.0,
        images_a_share=16,
        entry_bytes=200,
    )
    found = grown(measured, 100)
    assert found["images_per_s"] == 500
    assert found["load_s"] == pytest.approx(80)
    assert found["answers_gbit_s"] == pytest.approx(4)
    assert found["ingresses"] == 5
    assert found["driver_share"] == pytest.approx(0.625)
    assert found["store_mb_s"] == pytest.approx(0.1)
