"""`fastvar batch --ray`: the files of a run without Ray, whatever dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from fastvar.bulk.on_ray import draw_on_ray
from fastvar.bulk.run import BulkRun
from fastvar.errors import BundleError
from tests.bulk.test_rows import table
from tests.bulk.test_run import images, index, leftovers

pytest.importorskip("ray", reason="ray is not installed; `make test-ray` installs it")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": "blue", "seed": seed} for seed in range(count)]


def run(asked: list[dict[str, Any]], bundle: Path, folder: Path, draw: Any, workers: int = 1) -> Any:
    folder.mkdir(exist_ok=True)
    return BulkRun(table(folder, ".jsonl", asked), bundle, folder / "out", workers=workers).run(draw)


def test_the_files_are_those_of_a_run_without_ray(cluster, batched_bundle: Path, tmp_path: Path):
    asked = [*rows(12), {"prompt": "a " * 100}, {"prompt": "a", "sed": 1}]
    on_ray = run(asked, batched_bundle, tmp_path / "ray", draw_on_ray("local"), workers=2)
    (tmp_path / "plain").mkdir()
    plain = BulkRun(table(tmp_path / "plain", ".jsonl", asked), batched_bundle, tmp_path / "plain" / "out").run()
    assert (on_ray.drawn, on_ray.failed) == (plain.drawn, plain.failed) == (12, 2)
    assert {file.name: file.read_bytes() for file in images(tmp_path / "ray")} == {
        file.name: file.read_bytes() for file in images(tmp_path / "plain")
    }
    assert index(on_ray) == index(plain)
    again = run(asked, batched_bundle, tmp_path / "ray", draw_on_ray("local"))
    assert (again.drawn, again.there) == (0, 12)


def test_a_row_that_kills_its_actor_is_an_entry(cluster, batched_bundle: Path, tmp_path: Path):
    """Actors of another class, which a prompt kills; the class travels by name, as ours does."""
    asked = [*rows(4), {"prompt": "poison", "seed": 1}, {"prompt": "red", "seed": 2}]
    outcome = run(asked, batched_bundle, tmp_path, draw_on_ray("local", actor="tests.ray.poisoned:Poisoned"))
    assert (outcome.drawn, outcome.failed) == (5, 1)
    states = {entry["subject"]: entry for entry in index(outcome)}
    assert "3 processes died of it" in states["poison"]["error"]
    assert leftovers(tmp_path) == []


def test_another_bundle_on_a_machine_is_refused(cluster, batched_bundle: Path, tmp_path: Path):
    from dataclasses import replace

    draw = draw_on_ray("local")

    def elsewhere(items: Any, arguments: Any, workers: int, report: Any) -> None:
        draw(items, replace(arguments, digest="0" * 64), workers, report)

    with pytest.raises(BundleError, match="another bundle"):
        run(rows(2), batched_bundle, tmp_path, elsewhere)


def test_actors_killed_at_random_moments_are_replaced(cluster, batched_bundle: Path, tmp_path: Path):
    over = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        dice = random.Random(1)
        while not over.wait(dice.uniform(1.0, 3.0)) and len(killed) < 10:
            if pids := actors():
                killed.append(dice.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        draw = draw_on_ray("local", actor="tests.ray.poisoned:Slow")
        outcome = run(rows(60), batched_bundle, tmp_path, draw, workers=2)
    finally:
        over.set()
        killer.join()
    assert outcome.drawn == 60
    assert killed
    assert leftovers(tmp_path) == []


def actors() -> list[int]:
    """Processes of Ray that hold one of our actors."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if b"MapWorker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_a_driver_that_is_killed_goes_on(batched_bundle: Path, tmp_path: Path):
    file = table(tmp_path, ".jsonl", rows(40))
    command = [sys.executable, "-m", "fastvar.cli", "batch", str(file), "--bundle", str(batched_bundle)]
    command += ["--out", str(tmp_path / "out"), "--ray", "local"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(images(tmp_path)) < 5:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)
    process.kill()
    process.communicate()
    time.sleep(10)  # its cluster ends by itself
    before = {path: path.stat().st_mtime_ns for path in images(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(images(tmp_path)) == 40
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert leftovers(tmp_path) == []
    states = [row["state"] for row in pyarrow.parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()]
    assert states == ["drawn"] * 40
