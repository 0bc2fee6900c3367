"""Files of a profile: what is in them, and that nothing of others is lost."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from fastvar.errors import BackendError, InputError
from fastvar.profiling.records import Profile
from fastvar.profiling.report.files import COLUMNS, FILES, check_folder, write


@pytest.fixture
def written(measured: Profile, tmp_path: Path) -> Path:
    folder = tmp_path / "new" / "profile"
    assert sorted(path.name for path in write(measured, folder)) == sorted(FILES)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES), "no temporary file is left"
    return folder


def test_json_holds_everything(measured: Profile, written: Path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads((written / "profile.json").read_text(), parse_constant=refuse)
    assert found["settings"]["prompt"] == measured.settings["prompt"]
    assert found["speedup"]["image"] == measured.speedup("image")
    for bundle, expected in zip(found["bundles"], measured.bundles, strict=True):
        assert bundle["cost"]["flop"] == sum(row["cost"]["flop"] for row in bundle["stages"]) == expected.cost.flop
        assert bundle["memory"]["peak_bytes"] == expected.memory.recording.peak_bytes
        assert bundle["memory"]["peak_source"]
        assert bundle["memory"]["headroom_bytes"] == (64 << 30) - bundle["memory"]["peak_bytes"]
        assert len(bundle["kept"][0]["counts"]) == 16
        assert bundle["stages"][1]["flop_per_s"] == expected.stages[1].flop_per_s > 0


def test_csv_has_a_line_for_every_row(measured: Profile, written: Path):
    with (written / "profile.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS
    rows = [row for bundle in measured.bundles for row in (*bundle.stages, *bundle.engines)]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert (line["name"], float(line["ms_median"]), int(line["flop"])) == (row.name, row.ms.median, row.cost.flop)
        assert line["kept"] == ("" if row.kept is None else str(row.kept))


def test_its_own_files_are_written_again(measured: Profile, written: Path):
    (written / "notes.txt").write_text("mine")
    (written / "report.html").write_text((written / "report.html").read_text() + "older")
    write(measured, written)
    assert "older" not in (written / "report.html").read_text()
    assert (written / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", FILES)
def test_files_of_others_are_left_alone(measured: Profile, tmp_path: Path, name: str):
    (tmp_path / name).write_text("a,b\n{}<html>")
    with pytest.raises(InputError, match="was not written by"):
        write(measured, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "a,b\n{}<html>"


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_what_is_no_file_is_left_alone(tmp_path: Path, kind: str):
    path = tmp_path / "report.html"
    path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="was not written by"):
        check_folder(tmp_path)


def test_a_template_engine_that_is_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before anything is measured."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BackendError, match="jinja2") as caught:
        check_folder(tmp_path / "new")
    assert "fastvar-runtime[profile]" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is not a folder"):
        check_folder(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write"):
        check_folder(tmp_path / "file" / "below")
    check_folder(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
