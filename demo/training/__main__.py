"""Trains the demo model, stage after stage, each in a process of its own; finished stages are left alone.

`python -m demo.training` takes about half a day on two cores. Interrupted, it goes on where it stopped. What it writes
is not the checkpoint in demo/checkpoint: that one is replaced by hand, once the new one has been scored.
"""

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass

from demo.training.environment import VARIABLES
from demo.training.places import STATES

DONE = STATES / "done"


@dataclass(frozen=True)
class Stage:
    """One training program and how it is called; the name marks it as finished."""

    name: str
    command: tuple[str, ...]
    shortened: tuple[str, ...] = ("--steps", "2")


STAGES = (
    Stage("text_encoder", ("demo.training.text_encoder",)),
    Stage("latent_codec", ("demo.training.latent_codec",)),
    Stage("decoder", ("demo.training.image_tokenizer", "decoder")),
    Stage("transformer", ("demo.training.transformer",), ("--steps", "2", "--evaluated-captions", "1")),
    Stage("encoder", ("demo.training.image_tokenizer", "encoder")),
)


def run(stage: Stage, again: bool, shortened: bool, processes: int) -> None:
    """Run a stage unless it has finished before; raises CalledProcessError if it fails."""
    marker = DONE / stage.name
    if marker.exists() and not again:
        print(f"{stage.name}: finished before")
        return
    command = (*stage.command, *stage.shortened) if shortened else stage.command
    if stage.name == "transformer":
        command = (*command, "--processes", str(processes))
    print(f"{stage.name}: {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", *command], env={**os.environ, **VARIABLES}, check=True)
    DONE.mkdir(parents=True, exist_ok=True)
    marker.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=[s.name for s in STAGES], help="only this one, even if it has finished")
    parser.add_argument("--shortened", action="store_true", help="two steps of every stage: shows that all of it runs")
    cores = min(2, os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, default=cores, choices=(1, 2), help="that train the transformer")
    args = parser.parse_args()
    for stage in STAGES:
        if args.stage in (None, stage.name):
            run(stage, again=args.stage == stage.name, shortened=args.shortened, processes=args.processes)


if __name__ == "__main__":
    main()
