import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import scaling
from benchmarks.scaling import Measured, check_model, markdown_table, measure, slope, slopes
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import FastvarError
from fastvar.export.rebuild import rebuild
from fastvar.profiling.estimates.costs import engine_costs
from tests.conftest import TINY_POLICY


@pytest.fixture
def pair(tiny_bundle: Path, engine_cache: Path, tmp_path: Path) -> dict[str, Bundle]:
    """Two policies of the tiny model, under the names that a study knows; the second keeps fewer tokens."""
    (tmp_path / "other.toml").write_text(TINY_POLICY.replace("keep = 0.5", "keep = 0.25"))
    rebuild(tiny_bundle, tmp_path / "other", policy=str(tmp_path / "other.toml"), cache=engine_cache)
    return {"dense": Bundle.open(tiny_bundle), "fastvar": Bundle.open(tmp_path / "other")}


def row(pixels: int, policy: str, flop: float, ms: float | None = None) -> Measured:
    return Measured(pixels, policy, 1, pixels, flop, 1 << 20, 2 << 20, ms)


def test_slope_is_the_exponent():
    assert slope([(x, 7 * x**1.5) for x in (1, 4, 9, 100)]) == pytest.approx(1.5)
    assert slope([(2.0, 3.0)]) is None


def test_slopes_over_pixels_by_span():
    """Cost that grows as the pixels up to 512, and as their square beyond."""
    rows = [row(256, "dense", 1.0, 10.0), row(512, "dense", 4.0, 40.0), row(1024, "dense", 64.0, 640.0)]
    rows += [row(2048, "dense", 1024.0), row(256, "fastvar", 5.0, 5.0)]
    found = slopes(rows)
    assert found["dense"]["flop"]["512 to 1024"] == pytest.approx(2)
    assert found["dense"]["latency"]["512 to 1024"] == pytest.approx(2)
    assert found["dense"]["latency"]["drawn"] == pytest.approx(1.5)
    assert found["dense"]["flop"]["planned"] == pytest.approx(1.7)
    assert found["dense"]["forwarded tokens"]["drawn"] == pytest.approx(0.5)
    assert found["fastvar"]["latency"] == {"drawn": None, "512 to 1024": None}


def test_figures_of_a_size_that_is_drawn(pair: dict[str, Bundle]):
    dense, pruned = measure(pair, 256, runs=2)
    assert (dense.tokens, dense.forwarded_tokens, pruned.forwarded_tokens) == (273, 273 + 145, 273 + 81)
    assert dense.flop == sum(cost.flop for cost in engine_costs(pair["dense"].manifest, 2).by_scale().values())
    assert dense.flop > pruned.flop > 0
    assert dense.cache_bytes == 2 * 2 * (273 + 145) * 64 * 4  # keys and values, two rows, fp32
    assert dense.plan_bytes > dense.cache_bytes > pruned.cache_bytes
    assert len(dense.runs_ms) == len(pruned.runs_ms) == 2
    assert min(dense.runs_ms) <= dense.ms <= max(dense.runs_ms)
    assert dense.decoder_ms == pruned.decoder_ms > 0


def test_a_size_that_is_planned_is_not_drawn(pair: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling, "EngineContender", None)
    dense, pruned = measure(pair, 256, runs=0)
    assert (dense.ms, dense.decoder_ms, dense.runs_ms) == (None, None, ())
    assert dense.flop > pruned.flop > 0


def test_sizes_to_draw_and_to_plan():
    drawn, planned = check_model("infinity_layer12", "512, 256,512", None)
    assert drawn == [256, 512]
    assert planned in ([2048], [1536, 2048])  # those that there is a schedule for
    assert check_model("infinity_2b", "1024", "1024,2048") == ([1024], [2048])
    assert check_model("infinity_2b", "256", "") == ([256], [])


@pytest.mark.parametrize(
    ("model", "sizes", "planned", "problem"),
    [
        ("infinity_9b", "256", None, "no model size"),
        ("infinity_2b", "", None, "no size to draw"),
        ("infinity_2b", "300", None, "no scale schedule for 300x300"),
        ("infinity_2b", "256", "300", "no scale schedule for 300x300"),
        ("infinity_2b", "big", None, "not understood"),
        ("infinity_2b", "320x240", None, "not square"),
    ],
)
def test_bad_sizes(model: str, sizes: str, planned: str | None, problem: str):
    with pytest.raises(FastvarError, match=problem):
        check_model(model, sizes, planned)


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(scaling.main)
    return app


def test_the_study_from_end_to_end(pair, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Given:
        def __init__(self, folder: Path, model: str) -> None:
            assert model == "infinity_layer12"

        def at(self, side: int) -> dict[str, Bundle]:
            return pair

    monkeypatch.setattr(scaling, "Bundles", Given)
    options = ["--sizes", "256,512", "--plan-sizes", "1024", "--runs", "1"]
    paths = ["--out", str(tmp_path / "new" / "a.json"), "--plot", str(tmp_path / "a.svg")]
    done = CliRunner().invoke(command, [*options, *paths])
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "new" / "a.json").read_text())
    assert [(r["pixels"], r["policy"], r["ms"] is None) for r in data["sizes"]] == [
        (side, policy, side == 1024) for side in (256, 512, 1024) for policy in ("dense", "fastvar")
    ]
    assert data["slopes"]["dense"]["flop"]["planned"] == pytest.approx(0, abs=1e-9)  # the same bundle everywhere
    assert "fastvar, seconds" in (tmp_path / "a.svg").read_text()
    assert "| 1024x1024 | fastvar | 273 |" in done.output


def test_what_the_user_got_wrong_ends_with_2(command):
    done = CliRunner().invoke(command, ["--model", "infinity_9b"])
    assert done.exit_code == 2
    assert "expected: one of infinity_layer12" in done.output


def test_the_table_compares_with_dense_of_the_same_size():
    lines = markdown_table([row(256, "dense", 2e12, 2000.0), row(256, "fastvar", 1e12, 500.0), row(512, "dense", 4e12)])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
    assert cells[3] == ["256x256", "fastvar", "1", "256", "1", "1.0 MiB", "2.0 MiB", "0.50", "4.00", ""]
    assert cells[4][7:] == ["", "", ""]
