"""A disk that is full at every possible write: file systems in memory, a step larger each, until the work fits."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.torture.children import run_child
from tests.torture.kills import _state, expect
from tests.torture.models import Workshop

STEP_BYTES = 64 << 10


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system in memory."""
    try:
        with small_disk(folder / "probe", STEP_BYTES):
            return True
    except OSError:
        return False


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes.

    Raises:
        OSError: this process may not mount one.
    """
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise OSError("a file system in memory cannot be mounted")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill_disks(shop: Workshop, step_bytes: int = STEP_BYTES) -> dict[str, Any]:
    """A build, a rebuild in place, and images, each on disks from empty to large enough."""
    source = shop.empty("fitting") / "bundle"
    expect(run_child(lambda: shop.build(source)), "done")
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())

    def build(disk: Path) -> Callable[[], None]:
        return lambda: shop.build(disk / "bundle")

    def rebuild(disk: Path) -> Callable[[], None]:
        return lambda: shop.rebuild(disk / "bundle", disk / "bundle", "quarter")

    def draw(disk: Path) -> Callable[[], int]:
        return lambda: _draw(source, disk)

    places = {"build": (build, None, 0), "rebuild": (rebuild, source, size), "images": (draw, None, 0)}
    return {name: _grow(shop, name, *place, step_bytes) for name, place in places.items()}


def _grow(
    shop: Workshop,
    name: str,
    start: Callable[[Path], Callable[[], Any]],
    before: Path | None,
    least: int,
    step_bytes: int,
) -> dict[str, Any]:
    found: Counter[str] = Counter()
    steps, fits = 0, False
    while not fits:
        steps += 1
        with small_disk(shop.folder / f"disk-{name}", least + 2 * step_bytes + steps * step_bytes) as disk:
            if before is not None:
                shutil.copytree(before, disk / "bundle")
            there = set(os.listdir(disk))
            outcome = run_child(start(disk))
            found[outcome.kind] += 1
            fits = outcome.kind == "done" and outcome.value in (None, 0)
            found["left behind"] += sum(n.startswith(".") or n.endswith(".lock") for n in set(os.listdir(disk)) - there)
            found["broken bundle"] += _state(disk / "bundle") == "broken"
            found["lost bundle"] += before is not None and _state(disk / "bundle") != "whole"
        if steps > 2000:
            raise RuntimeError(f"{name} fits on no disk: {outcome.value}")
    bad = found["crashed"] + found["hung"] + found["left behind"] + found["broken bundle"] + found["lost bundle"]
    return {"disks": steps, "step_bytes": step_bytes, "found": dict(found), "bad": bad}


def _draw(bundle: Path, folder: Path) -> int:
    from fastvar import cli

    try:
        cli.main(["generate", str(bundle), *("a red circle", "a blue square"), "-n", "2", "--out", str(folder / "x")])
    except SystemExit as exit_:
        from fastvar.runtime.images.png import read_metadata

        for path in sorted((folder / "x").glob("*")) if (folder / "x").is_dir() else []:
            read_metadata(path)  # raises where an image is not whole
        return int(exit_.code or 0)
    return 0
