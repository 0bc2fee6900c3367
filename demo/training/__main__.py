"""Trains the demo model, stage after stage, each in a process of its own; finished stages are left alone.

`python -m demo.training` takes about two hours on two cores. Interrupted, it goes on where it stopped.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from demo.training.environment import VARIABLES

ROOT = Path(__file__).parents[1]
DONE = ROOT / "out" / "training" / "done"


@dataclass(frozen=True)
class Stage:
    """One training program and how it is called; the name marks it as finished."""

    name: str
    command: tuple[str, ...]


STAGES = (
    Stage("text_encoder", ("demo.training.text_encoder", "--out", str(ROOT / "checkpoint" / "text_encoder"))),
    Stage("patch_codec", ("demo.training.patch_codec",)),
    Stage("decoder", ("demo.training.image_tokenizer", "decoder")),
    Stage("encoder", ("demo.training.image_tokenizer", "encoder")),
    Stage("latents", ("demo.training.latents",)),
    Stage("transformer", ("demo.training.transformer",)),
)


def run(stage: Stage, again: bool) -> None:
    """Run a stage unless it has finished before; raises CalledProcessError if it fails."""
    marker = DONE / stage.name
    if marker.exists() and not again:
        print(f"{stage.name}: finished before")
        return
    print(f"{stage.name}: {' '.join(stage.command)}", flush=True)
    subprocess.run([sys.executable, "-m", *stage.command], env={**os.environ, **VARIABLES}, check=True)
    DONE.mkdir(parents=True, exist_ok=True)
    marker.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=[s.name for s in STAGES], help="only this one, even if it has finished")
    args = parser.parse_args()
    for stage in STAGES:
        if args.stage in (None, stage.name):
            run(stage, again=args.stage == stage.name)


if __name__ == "__main__":
    main()
