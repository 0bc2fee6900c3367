"""kill -9 at random moments of a build, a rebuild in place and a batch: no broken bundle, no lost image."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import FastvarError
from tests.torture.children import Outcome, run_child
from tests.torture.models import Workshop

PROMPTS = ("a red circle", "a blue square", "a green triangle", "a red square above a blue circle")
LATEST = 1.15  # of the time of an undisturbed run: some kills come too late, and the run must then be whole


def kill_builds(shop: Workshop, trials: int, rng: random.Random) -> dict[str, Any]:
    """Builds into an empty place. After each kill there is no bundle or a whole one, and the next build works."""

    def start(folder: Path) -> Callable[[], None]:
        return lambda: shop.build(folder / "bundle")

    return _kills("build", shop, trials, rng, start, before=None)


def kill_rebuilds(shop: Workshop, trials: int, rng: random.Random) -> dict[str, Any]:
    """Rebuilds in place. After each kill the old bundle or the new one is there, whole."""
    source = shop.empty("source") / "bundle"
    expect(run_child(lambda: shop.build(source)), "done")

    def start(folder: Path) -> Callable[[], None]:
        return lambda: shop.rebuild(folder / "bundle", folder / "bundle", "quarter")

    return _kills("rebuild", shop, trials, rng, start, before=source)


def _kills(
    name: str,
    shop: Workshop,
    trials: int,
    rng: random.Random,
    start: Callable[[Path], Callable[[], None]],
    before: Path | None,
) -> dict[str, Any]:
    def fresh() -> Path:
        folder = shop.empty(name)
        if before is not None:
            shutil.copytree(before, folder / "bundle")
        return folder

    expect(run_child(start(fresh())), "done")  # fills the engine cache
    seconds = expect(run_child(start(fresh())), "done").seconds
    found: Counter[str] = Counter()
    for _ in range(trials):
        folder = fresh()
        outcome = run_child(start(folder), kill_after=rng.uniform(0, LATEST * seconds))
        found[outcome.kind] += 1
        found[f"{_state(folder / 'bundle')} bundle"] += 1
        found["next build failed"] += run_child(lambda at=folder: shop.build(at / "bundle")).kind != "done"
        found["broken after the next build"] += _state(folder / "bundle") != "whole"
        found["files left after the next build"] += len(os.listdir(folder)) - 1
    bad = found["broken bundle"] + found["next build failed"] + found["broken after the next build"]
    bad += found["no bundle"] if before is not None else 0
    bad += found["crashed"] + found["files left after the next build"]
    return {"trials": trials, "seconds_undisturbed": round(seconds, 2), "found": dict(found), "bad": bad}


def kill_batches(shop: Workshop, trials: int, rng: random.Random) -> dict[str, Any]:
    """Batches on the command line. Every image that was reported is there, and every file that is there is whole."""
    bundle = shop.empty("drawn") / "bundle"
    expect(run_child(lambda: shop.build(bundle)), "done")
    seconds = expect(run_child(lambda: _draw(bundle, shop.empty("batch"))), "exit").seconds
    found: Counter[str] = Counter()
    for _ in range(trials):
        folder = shop.empty("batch")
        outcome = run_child(lambda at=folder: _draw(bundle, at), kill_after=rng.uniform(0, LATEST * seconds))
        found[outcome.kind] += 1
        reported = {line.split(" (seed")[0].removeprefix("wrote ") for line in _lines(folder / "said.txt")}
        images = sorted((folder / "images").glob("[!.]*")) if (folder / "images").is_dir() else []
        found["images"] += len(images)
        found["images reported"] += len(reported)
        found["lost images"] += sum(not Path(path).is_file() for path in reported)
        found["broken images"] += sum(not _is_whole(path) for path in images)
    bad = found["lost images"] + found["broken images"] + found["crashed"]
    return {"trials": trials, "seconds_undisturbed": round(seconds, 2), "found": dict(found), "bad": bad}


def _draw(bundle: Path, folder: Path) -> None:
    from fastvar import cli

    with (folder / "said.txt").open("w", buffering=1) as said, contextlib.redirect_stdout(said):
        arguments = ["generate", bundle, *PROMPTS, "-n", 5, "--seed", 1, "--threads", 1, "--out", folder / "images"]
        cli.main([str(argument) for argument in arguments])


def _lines(path: Path) -> list[str]:
    """Whole lines that were written."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def _is_whole(path: Path) -> bool:
    from fastvar.runtime.images.png import read_metadata

    try:
        return {"prompt", "seed", "settings", "bundle"} <= set(read_metadata(path))
    except FastvarError:
        return False


def _state(bundle: Path) -> str:
    if not bundle.exists():
        return "no"
    try:
        Bundle.open(bundle, verify="all")
    except FastvarError:
        return "broken"
    return "whole"


def expect(outcome: Outcome, kind: str) -> Outcome:
    """The outcome, if it is of a kind; campaigns cannot go on without what they prepare."""
    if outcome.kind != kind:
        raise RuntimeError(f"{outcome.kind} instead of {kind}: {outcome.value}")
    return outcome
