"""A table becomes a folder of images, whatever rows it holds and whatever dies on the way."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from fastvar import Pipeline, SamplingParams
from fastvar.bulk import processes
from fastvar.bulk.drawer import Drawer
from fastvar.bulk.run import BulkRun, Outcome
from fastvar.errors import BundleError, InputError
from fastvar.runtime.images.formats import read_metadata
from tests.bulk.test_rows import table

MANY = 60
SMALL = Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def run(rows: list[dict[str, Any]], bundle: Path, folder: Path, **options: Any) -> Outcome:
    folder.mkdir(exist_ok=True)
    return BulkRun(table(folder, ".jsonl", rows), bundle, folder / "out", **options).run()


def index(outcome: Outcome) -> list[dict[str, Any]]:
    return list(pyarrow.parquet.read_table(outcome.index).to_pylist())


def leftovers(folder: Path) -> list[str]:
    """Files that are neither images nor what is told of them."""
    files = [file for file in (folder / "out").rglob("*") if file.is_file()]
    return [file.name for file in files if file.suffix not in (".png", ".json", ".parquet")]


def pixels(image: Any) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image)


def test_every_row_becomes_its_image(batched_bundle: Path, tmp_path: Path):
    SMALL.save(tmp_path / "small.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    rows: list[dict[str, Any]] = [
        {"prompt": "a red circle", "seed": 1, "id": "first"},
        {"prompt": "a blue square", "seed": 2, "guidance_scale": 1},
        {"prompt": "yellow", "seed": 3, "num_images": 2, "negative_prompt": "red", "tau": 0.7},
        {"prompt": "a red circle", "seed": 4, "image": "small.png", "keep_scales": 1},
        {"prompt": "a red circle", "seed": 5, "image": "small.png", "mask": "mask.png"},
    ]
    outcome = run(rows, batched_bundle, tmp_path)
    assert (outcome.drawn, outcome.there, outcome.failed) == (6, 0, 0)
    entries = index(outcome)
    assert [(entry["row"], entry["place"]) for entry in entries] == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 0), (5, 0)]
    assert {entry["state"] for entry in entries} == {"drawn"}
    assert (entries[0]["id"], entries[0]["seed"], entries[0]["width"]) == ("first", 1, 256)
    with Pipeline.load(batched_bundle) as pipe:
        own = [
            pipe("a red circle", seed=1),
            pipe("a blue square", seed=2, guidance_scale=1),
            pipe("yellow", seed=3, negative_prompt="red", tau=0.7),
            pipe("yellow", seed=4, negative_prompt="red", tau=0.7),
            pipe.upscale(SMALL, "a red circle", seed=4, keep_scales=1),
            pipe.inpaint(SMALL, mask, "a red circle", seed=5),
        ]
        digest = pipe.bundle.digest
    for entry, output in zip(entries, own, strict=True):
        file = tmp_path / "out" / entry["file"]
        assert np.array_equal(pixels(file), pixels(output.images[0]))
        found = read_metadata(file)
        assert (found["prompt"], found["seed"]) == (entry["subject"], str(entry["seed"]))
        assert (found["bundle"], found["key"]) == (digest, entry["key"])
    assert leftovers(tmp_path) == []


def test_labels_and_other_formats(var_editing_bundle: Path, tmp_path: Path):
    outcome = run([{"class_label": 3, "seed": 1}], var_editing_bundle, tmp_path, image_format="webp")
    (entry,) = index(outcome)
    assert entry["file"].endswith(".webp")
    assert Image.open(tmp_path / "out" / entry["file"]).format == "WEBP"


def test_what_is_there_is_not_drawn_again(batched_bundle: Path, tmp_path: Path):
    rows = [{"prompt": prompt} for prompt in ("a circle", "a square", "blue")]
    first = run(rows, batched_bundle, tmp_path)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "images").iterdir()}
    gone = sorted(files)[0]
    gone.unlink()
    before = gone.name
    again = run([*rows, {"prompt": "yellow", "seed": 1}], batched_bundle, tmp_path)
    assert (first.drawn, again.drawn, again.there) == (3, 2, 2)
    now = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "images").iterdir()}
    assert len(now) == 4
    assert all(now[file] == when for file, when in files.items() if file.name != before)


def test_equal_rows_are_one_image_and_two_entries(batched_bundle: Path, tmp_path: Path):
    outcome = run([{"prompt": "blue", "seed": 1, "id": name} for name in "ab"], batched_bundle, tmp_path)
    assert outcome.drawn == 1
    assert [entry["id"] for entry in index(outcome)] == ["a", "b"]
    assert len({entry["file"] for entry in index(outcome)}) == 1


def test_bad_rows_are_entries_and_the_rest_is_drawn(batched_bundle: Path, tmp_path: Path):
    rows: list[dict[str, Any]] = [
        {"prompt": "blue", "seed": 1},
        {"prompt": "blue", "sed": 1},
        {"prompt": "a " * 100, "seed": 1, "id": "long"},
        {"class_label": 3},
        {"prompt": "blue", "image": "none.png"},
        {"prompt": "blue", "guidance_scale": 1, "negative_prompt": "red"},
    ]
    outcome = run(rows, batched_bundle, tmp_path)
    assert (outcome.drawn, outcome.failed) == (1, 5)
    entries = index(outcome)
    assert [entry["state"] for entry in entries] == ["drawn"] + ["failed"] * 5
    told = ["'sed'", "tokens", "class label", "cannot read", "no effect"]
    assert all(word in entry["error"] for word, entry in zip(told, entries[1:], strict=True))
    assert all("expected: " in entry["error"] or "fix: " in entry["error"] for entry in entries[1:])
    mended = run([rows[0], {"prompt": "blue", "seed": 2}], batched_bundle, tmp_path)
    assert (mended.drawn, mended.there, mended.failed) == (1, 1, 0)


def test_a_folder_is_drawn_into_by_one_at_a_time(batched_bundle: Path, tmp_path: Path):
    from fastvar.engines.cache.lock import FolderLock

    (tmp_path / "out").mkdir()
    lock = FolderLock(tmp_path / "out" / "run")
    lock.acquire()
    with pytest.raises(BundleError):
        run([{"prompt": "blue"}], batched_bundle, tmp_path)
    lock.release()


def test_another_bundle_under_the_name_is_refused(batched_bundle: Path, tmp_path: Path):
    with pytest.raises(BundleError, match="another bundle"):
        Drawer(batched_bundle, "0" * 64, tmp_path, "png")


def test_a_bundle_that_cannot_be_opened(tmp_path: Path):
    with pytest.raises(BundleError):
        run([{"prompt": "blue"}], tmp_path / "none", tmp_path)


def test_options_of_the_pipeline_that_are_wrong(batched_bundle: Path, tmp_path: Path):
    from fastvar.errors import FastvarError

    with pytest.raises(FastvarError, match=r"KiB|budget|memory"):
        run([{"prompt": "blue"}], batched_bundle, tmp_path, load_options={"memory_budget": "1KiB"})


def test_an_empty_table(batched_bundle: Path, tmp_path: Path):
    with pytest.raises(InputError, match="holds no rows"):
        run([], batched_bundle, tmp_path)


# Deaths


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Drawing processes that some prompts kill."""
    monkeypatch.setattr(processes, "STATEMENT", "from tests.bulk import poison; poison.main()")
    monkeypatch.setenv("FIRST_ATTEMPT", str(tmp_path / "first"))
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_row_that_kills_its_process_three_times_is_an_entry(batched_bundle: Path, deadly: Path, workers: int):
    rows = [{"prompt": prompt, "seed": 1} for prompt in ("a", "poison", "blue", "red", "green", "yellow")]
    outcome = run(rows, batched_bundle, deadly, workers=workers)
    assert (outcome.drawn, outcome.failed) == (5, 1)
    states = {entry["subject"]: entry for entry in index(outcome)}
    assert states["poison"]["state"] == "failed"
    assert "3 processes died of it" in states["poison"]["error"]
    assert "--retry-errors" in states["poison"]["error"]
    assert run(rows, batched_bundle, deadly).failed == 1, "it is not tried again"


def test_what_died_once_is_drawn(batched_bundle: Path, deadly: Path):
    rows = [{"prompt": prompt, "seed": 1} for prompt in ("a", "once", "blue")]
    outcome = run(rows, batched_bundle, deadly)
    assert (outcome.drawn, outcome.failed) == (3, 0)
    assert list((deadly / "out" / "attempts").iterdir()) == []


def test_errors_can_be_tried_again(batched_bundle: Path, deadly: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"prompt": prompt, "seed": 1} for prompt in ("poison", "blue")]
    assert run(rows, batched_bundle, deadly).failed == 1
    monkeypatch.undo()
    again = run(rows, batched_bundle, deadly, retry_errors=True)
    assert (again.drawn, again.there, again.failed) == (1, 1, 0)


COMMAND = """
import sys
from fastvar.bulk import processes
processes.STATEMENT = "from tests.bulk import poison; poison.main()"
from fastvar.cli import main
main(sys.argv[1:])
"""


def started(bundle: Path, folder: Path, *options: str, pace: str = "0.05") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", COMMAND, "batch", str(folder / "table.jsonl"), "--bundle", str(bundle)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [*command, "--out", str(folder / "out"), *options],
        cwd=root,
        env=os.environ | {"PACE": pace},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(batched_bundle: Path, tmp_path: Path):
    """Ten times; each run goes on from what the last one left, and draws nothing again that was complete."""
    dice = random.Random(1)
    table(tmp_path, ".jsonl", [{"prompt": "blue", "seed": seed} for seed in range(MANY)])
    seen: dict[str, int] = {}
    for _ in range(10):
        process = started(batched_bundle, tmp_path)
        time.sleep(dice.uniform(0.5, 3.0))
        process.kill()
        process.communicate(timeout=120)
        check_whole(tmp_path, seen)
    finish(batched_bundle, tmp_path, seen)


@pytest.mark.slow
def test_workers_killed_at_any_moment_are_replaced(batched_bundle: Path, tmp_path: Path):
    """Ten of them in one run."""
    dice = random.Random(1)
    table(tmp_path, ".jsonl", [{"prompt": "blue", "seed": seed} for seed in range(MANY)])
    process, seen = started(batched_bundle, tmp_path, "--workers", "2", pace="0.3"), dict[str, int]()
    for _ in range(10):
        before = len(images(tmp_path))
        while len(images(tmp_path)) == before:  # processes that die before they draw are another matter
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        time.sleep(dice.uniform(0.0, 0.6))
        if workers := children(process.pid):
            os.kill(dice.choice(workers), signal.SIGKILL)
        check_whole(tmp_path, seen)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    finish(batched_bundle, tmp_path, seen)


def check_whole(folder: Path, seen: dict[str, int]) -> None:
    for file in images(folder):
        with Image.open(file) as image:
            image.load()
        when = file.stat().st_mtime_ns
        assert seen.setdefault(file.name, when) == when, "drawn twice"


def finish(bundle: Path, folder: Path, seen: dict[str, int]) -> None:
    """A last run, after which all is there, and nothing else; an image may have been hit three times."""
    process = started(bundle, folder, "--retry-errors", pace="0")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    check_whole(folder, seen)
    entries = pyarrow.parquet.read_table(folder / "out" / "index.parquet").to_pylist()
    assert [entry["state"] for entry in entries] == ["drawn"] * MANY
    assert {entry["file"] for entry in entries} == {f"images/{file.name}" for file in images(folder)}
    assert leftovers(folder) == []


def images(folder: Path) -> list[Path]:
    return sorted(file for file in (folder / "out").glob("images/*.png") if not file.name.startswith("."))


def children(pid: int) -> list[int]:
    """Processes that it started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_interrupted_it_can_be_resumed_and_says_so_in_the_index(batched_bundle: Path, tmp_path: Path):
    table(tmp_path, ".jsonl", [{"prompt": "blue", "seed": seed} for seed in range(60)])
    process = started(batched_bundle, tmp_path)
    while len(images(tmp_path)) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    entries = pyarrow.parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    states = [entry["state"] for entry in entries]
    assert 3 <= states.count("drawn") == len(images(tmp_path)) < 60
    assert states.count("missing") == 60 - states.count("drawn")
    assert leftovers(tmp_path) == []


def test_the_command_tells_what_came_of_it(run_command, batched_bundle: Path, tmp_path: Path):
    table(tmp_path, ".csv", [{"prompt": "blue", "seed": 1}, {"prompt": "a " * 100, "seed": 2}])
    arguments = ("batch", tmp_path / "table.csv", "--bundle", batched_bundle, "--out", "out")
    code, out, _ = run_command(*arguments)
    assert (code, out.startswith("1 drawn, 0 were there, 1 failed: ")) == (0, True)
    (tmp_path / "bad").mkdir()
    table(tmp_path / "bad", ".csv", [{"prompt": "a " * 100}])
    code, _, err = run_command("batch", tmp_path / "bad" / "table.csv", "--bundle", batched_bundle, "--out", "none")
    assert code == 2
    assert "no image could be drawn" in err


@pytest.fixture
def run_command(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("run")


def test_params_are_what_rows_leave_unsaid(batched_bundle: Path, tmp_path: Path):
    outcome = run([{"prompt": "blue", "seed": 1}], batched_bundle, tmp_path, params=SamplingParams(guidance_scale=1))
    assert json.loads(index(outcome)[0]["settings"]) == {"guidance_scale": 1}
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_that_cannot_be_written_ends_the_run(
    batched_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
):
    """A full disk is nobody's row: nothing is blamed, and the run goes on when there is room."""
    monkeypatch.setattr(processes, "STATEMENT", "from tests.bulk import poison; poison.full_disk()")
    rows = [{"prompt": "blue", "seed": seed} for seed in range(12)]
    with pytest.raises(InputError, match=r"cannot write into .*: No space left on device"):
        run(rows, batched_bundle, tmp_path, workers=workers)
    assert leftovers(tmp_path) == []
    assert list((tmp_path / "out" / "errors").iterdir()) == []
    monkeypatch.undo()
    again = run(rows, batched_bundle, tmp_path)
    assert (again.drawn + again.there, again.failed) == (12, 0)


@pytest.mark.parametrize(("left", "workers", "share"), [(1000, 1, 16), (1000, 2, 16), (20, 2, 10), (1, 4, 1)])
def test_shares_are_some_passes_and_leave_enough_for_others(left: int, workers: int, share: int):
    arguments = processes.DrawerArguments("bundle", "digest", 4, "out", "png", None, {})
    assert arguments.share(left, workers) == share
