"""Trains the demo's class-conditional model, stage after stage; finished stages are left alone.

`python -m demo.training.var` takes three quarters of an hour on one core, and goes on where it stopped. It writes
demo/out/var in the official layout.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

from demo.training.environment import VARIABLES
from demo.training.var import codec, stages
from demo.training.var.codec import STATES

STAGES: dict[str, tuple[Callable[[float], None], float]] = {  # name -> what trains it, minutes
    "codec": (codec.train, 7),
    "decoder": (lambda minutes: stages.train_tokenizer("decoder", minutes), 9),
    "encoder": (lambda minutes: stages.train_tokenizer("encoder", minutes), 1.5),
    "transformer": (lambda minutes: stages.train_transformer(minutes, codec.load()), 27),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, help="only this one, in this process, even if it has finished")
    parser.add_argument("--minutes", type=float, help="of that stage, earlier runs included")
    arguments = parser.parse_args()
    if arguments.stage:
        train, minutes = STAGES[arguments.stage]
        train(arguments.minutes or minutes)
        (STATES / f"{arguments.stage}.done").touch()
        return
    for stage in STAGES:
        if (STATES / f"{stage}.done").exists():
            print(f"{stage}: finished before")
            continue
        command = [sys.executable, "-m", "demo.training.var", "--stage", stage]
        subprocess.run(command, env={**os.environ, **VARIABLES}, check=True)


if __name__ == "__main__":
    main()
