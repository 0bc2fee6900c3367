"""`python -m benchmarks.serving.bulk BUNDLE`: `fastvar batch`, plain and on Ray, against a loop over the pipeline.

Each draws the same captions, in a process of its own, in turn, and leaves files. A rate is that of the files behind the
first pass, by when they were written, so that no start counts; the seconds of the whole process are told beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from benchmarks.serving.recorded import RESULTS, record
from demo.sheet import held_out_captions
from fastvar.bulk.index import INDEX
from fastvar.core.platform import import_extra
from fastvar.engines.bundle.bundle import Bundle

SEED = 3
# What somebody writes who has no such command: passes as large as the bundle has, and Pillow's own way to save.
LOOP = """
import json, sys
from pathlib import Path
from fastvar import Pipeline
bundle, table, out = map(Path, sys.argv[1:])
out.mkdir(parents=True)
rows = [json.loads(line) for line in table.read_text().splitlines()]
with Pipeline.load(bundle) as pipe:
    most = pipe.batch_sizes["on"][-1]
    for first in range(0, len(rows), most):
        some = rows[first : first + most]
        images = pipe([row["prompt"] for row in some], seed=[row["seed"] for row in some]).images
        for row, image in zip(some, images):
            image.save(out / f"{row['seed']}.png")
"""


def loop(bundle: Path, table: Path, out: Path) -> list[Path]:
    """A bare loop."""
    subprocess.run([sys.executable, "-c", LOOP, str(bundle), str(table), str(out)], check=True)
    return list(out.iterdir())


def batch(*options: str) -> Callable[[Path, Path, Path], list[Path]]:
    """The command."""

    def drawn(bundle: Path, table: Path, out: Path) -> list[Path]:
        command = [sys.executable, "-m", "fastvar.cli", "batch", str(table), "--bundle", str(bundle)]
        subprocess.run([*command, "--out", str(out), *options], check=True, stdout=subprocess.DEVNULL)
        return list((out / "images").iterdir())

    return drawn


def rate_of(files: list[Path], first: int) -> float:
    """Images a second behind the first pass."""
    written = sorted(file.stat().st_mtime_ns for file in files)
    return (len(written) - first) / ((written[-1] - written[first - 1]) / 1e9)


def contents(files: list[Path]) -> list[str]:
    """Digests of the pixels, whoever encoded them."""
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append(sha256(image.tobytes()).hexdigest())
    return sorted(found)


def measure(bundle: Path, images: int, rounds: int) -> dict[str, Any]:
    import_extra("ray", "ray")
    parquet = import_extra("pyarrow.parquet", "batch")
    first = max(own.images for own in Bundle.open(bundle).manifest.sets)
    contenders = {"loop": loop, "batch": batch(), "batch on ray": batch("--ray", "local")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    drawn: dict[str, list[str]] = {}
    written: dict[str, dict[str, bytes]] = {}
    rows_of: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.jsonl"
        rows = [{"prompt": text, "seed": seed} for seed, text in enumerate(held_out_captions(images, SEED))]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for turn in range(rounds):
            for name, draw in contenders.items():
                begun = time.monotonic()
                files = draw(bundle, table, Path(folder) / f"{name}-{turn}")
                found[name].append({"seconds": time.monotonic() - begun, "images_per_s": rate_of(files, first)})
                drawn[name] = contents(files)
                written[name] = {file.name: file.read_bytes() for file in files}
                if (index := Path(folder) / f"{name}-{turn}" / INDEX).exists():
                    rows_of[name] = parquet.read_table(index).num_rows
    medians = {name: median(one["images_per_s"] for one in runs) for name, runs in found.items()}
    return {
        "images": images,
        "rounds": found,
        "of_the_loop": {name: rate / medians["loop"] for name, rate in medians.items()},
        "equal_pixels": all(own == drawn["loop"] for own in drawn.values()),
        "equal_files": written["batch"] == written["batch on ray"],
        "index_rows": rows_of,
        "files": {name: len(own) for name, own in drawn.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "bulk.json")
    given = parser.parse_args()
    measured = record(given.bundle, given.out, lambda: measure(given.bundle, given.images, given.rounds))
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
