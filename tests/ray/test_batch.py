"""`fastvar batch --ray`: the files of a run without Ray, whatever dies."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from fastvar.bulk.on_ray import draw_on_ray
from fastvar.bulk.run import BulkRun
from fastvar.errors import BundleError
from tests.bulk.test_rows import table
from tests.bulk.test_run import check_whole, images, index, leftovers

pytest.importorskip("ray", reason="ray is not installed; `make test-ray` installs it")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
KILLS = pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])


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


@KILLS
def test_actors_killed_at_random_moments_are_replaced(cluster, batched_bundle: Path, tmp_path: Path, kills: int):
    """What an image's process died of three times is an error; a run that tries it again draws it, and no other."""
    over, killed, seen = threading.Event(), list[int](), dict[str, int]()
    asked = rows(30 + 10 * kills)

    def kill() -> None:
        dice = random.Random(kills)
        while len(killed) < kills and not over.wait(dice.uniform(0.3, 2.5)):
            check_whole(tmp_path, seen)
            if pids := actors():
                killed.append(dice.choice(pids))
                os.kill(killed[-1], signal.SIGKILL)

    with ThreadPoolExecutor(1) as pool:
        killer = pool.submit(kill)
        try:
            draw = draw_on_ray("local", actor="tests.ray.poisoned:Slow")
            first = run(asked, batched_bundle, tmp_path, draw, workers=2)
        finally:
            over.set()
        killer.result()
    assert len(killed) == kills
    assert first.drawn + first.failed == len(asked)
    check_whole(tmp_path, seen)
    table(tmp_path, ".jsonl", asked)
    again = BulkRun(tmp_path / "table.jsonl", batched_bundle, tmp_path / "out", retry_errors=True)
    outcome = again.run(draw_on_ray("local"))
    assert (outcome.drawn, outcome.there, outcome.failed) == (first.failed, first.drawn, 0)
    check_all_there(tmp_path, len(asked), seen)


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


@KILLS
def test_a_driver_killed_at_random_moments_goes_on(batched_bundle: Path, tmp_path: Path, kills: int):
    """Each run goes on from what the last one left, though actors of a driver that is gone draw for some seconds."""
    dice, seen, wanted = random.Random(kills), dict[str, int](), 30 + 20 * kills
    file = table(tmp_path, ".jsonl", rows(wanted))
    for _ in range(kills):
        process = started(file, batched_bundle, actor="Slow")
        wait_for_actors(process)
        time.sleep(dice.uniform(0.0, 6.0))
        process.kill()
        process.communicate()
        wait_for_none()
        check_whole(tmp_path, seen)
    left = wanted - len(seen)
    assert 0 < left < wanted, "killed in the middle of it"
    process = started(file, batched_bundle, "--retry-errors")  # an image may have been hit three times
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert f"{left} drawn, {wanted - left} were there, 0 failed" in out
    check_all_there(tmp_path, wanted, seen)


def test_a_run_that_is_asked_to_end_says_so_in_the_index(batched_bundle: Path, tmp_path: Path):
    process = started(table(tmp_path, ".jsonl", rows(100)), batched_bundle, actor="Slow")
    wait_for_actors(process)
    while len(images(tmp_path)) < 3:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    wait_for_none()
    assert process.returncode == 143, err[-3000:]
    assert "Traceback" not in err
    states = [row["state"] for row in pyarrow.parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()]
    assert 3 <= states.count("drawn") < 100
    assert states.count("missing") == 100 - states.count("drawn")
    assert leftovers(tmp_path) == []


COMMAND = """
import sys
from fastvar.bulk import on_ray
on_ray.ACTOR = sys.argv.pop(1)
from fastvar.cli import main
main(sys.argv[1:])
"""


def started(file: Path, bundle: Path, *options: str, actor: str = "Actor") -> subprocess.Popen[str]:
    """`fastvar batch --ray local` into the folder out beside the table."""
    kind = "fastvar.bulk.on_ray:Actor" if actor == "Actor" else f"tests.ray.poisoned:{actor}"
    command = [sys.executable, "-c", COMMAND, kind, "batch", str(file), "--bundle", str(bundle)]
    command += ["--out", str(file.parent / "out"), "--ray", "local", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_actors(process: subprocess.Popen[str]) -> None:
    while not actors():
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.1)


def wait_for_none() -> None:
    """Actors end some seconds after their driver."""
    end = time.monotonic() + 60
    while actors():
        assert time.monotonic() < end
        time.sleep(0.1)


def check_all_there(folder: Path, count: int, seen: dict[str, int]) -> None:
    """Exactly the wanted files, each written once, and the index tells of them."""
    check_whole(folder, seen)
    assert len(seen) == len(images(folder)) == count
    assert leftovers(folder) == []
    entries = pyarrow.parquet.read_table(folder / "out" / "index.parquet").to_pylist()
    assert [entry["state"] for entry in entries] == ["drawn"] * count
    assert {entry["file"] for entry in entries} == {f"images/{name}" for name in seen}
