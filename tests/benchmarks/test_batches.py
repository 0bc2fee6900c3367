"""`make bench-batches` from end to end, with the tiny model on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from benchmarks import batches, timing
from benchmarks.batches import BEGIN, END, engine_entries, pass_record, require_alike
from benchmarks.contenders import EngineContender
from benchmarks.tables import placed_in
from benchmarks.timing import Run
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import InputError, NumericsError
from fastvar.profiling.profiled_bundle import random_features
from tests.conftest import TINY_POLICY

PAGE = f"# Page\n\n{BEGIN}\nold\n{END}\nafter\n"


@pytest.fixture
def here(engine_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers of images, no rest between turns, and what has processes of its own runs in this one."""
    monkeypatch.setenv("FASTVAR_CACHE", str(engine_cache))
    monkeypatch.setattr(batches, "run_apart", lambda _, function, *arguments: function(*arguments))
    monkeypatch.setattr(timing, "come_to_rest", lambda: None)
    monkeypatch.setattr(batches, "BATCHES", (1, 2))
    monkeypatch.setattr(batches, "ON_GPUS", {})


def run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(batches.main)
    options = ("--models", "tiny", "--engines", "onnxruntime:fp32", "--prompt-tokens", 16, "--runs", 2)
    return CliRunner().invoke(app, [str(argument) for argument in (*options, *arguments)])


@pytest.mark.slow
def test_the_tiny_model_from_end_to_end(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny.toml").write_text(TINY_POLICY)
    (tmp_path / "page.md").write_text(PAGE)
    files = ("--bundles", tmp_path / "made", "--out", tmp_path / "found.json", "--docs", tmp_path / "page.md")
    built = run(*files, "--policy", tmp_path / "tiny.toml", "--build-only")
    assert built.exit_code == 0, built.output
    assert not (tmp_path / "found.json").exists()
    (folder,) = (tmp_path / "made").iterdir()
    assert [own.batch for own in Bundle.open(folder).manifest.sets] == [(2, 1), (2, 2)]

    def no_build(*_: object) -> None:
        raise AssertionError("what is there is not built again")

    monkeypatch.setattr(batches, "run_apart", no_build)
    done = run(*files, "--policy", tmp_path / "tiny.toml")
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "found.json").read_text())
    (found,) = data["passes"]
    assert found["model"] == "tiny"
    assert list(found["batches"]) == ["1", "2"]
    for images, own in found["batches"].items():
        assert own["images"] == int(images)
        assert own["image_ms"] == pytest.approx(own["text_ms"] + own["scales_ms"] + own["decode_ms"])
        assert len(own["scale_ms"]) == 3
        assert own["error_against_alone"] < 1e-4
    ratio = found["times_one_image"]["2"]
    assert ratio["min"] <= ratio["median"] <= ratio["max"]
    assert found["load_before"] is None or found["load_before"] >= 0
    (launched,) = data["launches"].values()
    assert [own["images"] for own in launched] == [1, 2, 4, 8]
    assert launched[0]["engines_an_image"] > 3 * launched[3]["engines_an_image"]
    page = (tmp_path / "page.md").read_text()
    assert page.startswith(f"# Page\n\n{BEGIN}\n\n| model |")
    assert page.endswith(f"\n\n{END}\nafter\n")
    assert "old" not in page
    assert f"| tiny | onnxruntime:fp32 | {found['batches']['1']['scales_ms']:,.1f} / " in page


def test_milliseconds_are_those_of_one_image():
    found = pass_record(4, [Run(8.0, (4.0, 12.0), 40.0), Run(4.0, (8.0, 20.0), None), Run(12.0, (6.0, 18.0), 44.0)])
    assert (found["text_ms"], found["scales_ms"], found["decode_ms"], found["image_ms"]) == (2.0, 6.0, 10.5, 18.5)
    assert found["scales_ms_spread"] == [4.0, 7.0]
    assert found["scale_ms"] == [1.5, 4.5]


def test_images_that_are_others_than_alone_are_not_timed(batched_bundle: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = Bundle.open(batched_bundle)
    text, settings = random_features(bundle.manifest), batches.Model("tiny", 2).settings
    alone, several = (EngineContender(bundle, text, settings, images=images) for images in (1, 4))
    assert require_alike(alone, several, "fp32") < 1e-4
    drawn = several.logits

    def shuffled(noise: object) -> list[object]:
        return [scale[::-1] for scale in drawn(noise)]

    monkeypatch.setattr(several, "logits", shuffled)
    with pytest.raises(NumericsError, match="a pass of 4 are others than alone"):
        require_alike(alone, several, "fp32")


def test_eager_torch_draws_one_image_at_a_time():
    with pytest.raises(InputError, match="eager-dense:bf16 draws one image at a time"):
        engine_entries("onnxruntime:fp32,eager-dense:bf16", "fastvar")


@pytest.mark.parametrize("page", ["nothing", f"{END}\n{BEGIN}", BEGIN])
def test_a_page_without_a_place_for_the_table(page: str):
    with pytest.raises(InputError, match="no place for the table"):
        placed_in(page, "| a |", BEGIN, END)
