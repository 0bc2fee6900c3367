"""Encodes rendered training scenes once: the transformer trains on these latents, never on pixels.

`python -m demo.training.latents` writes demo/training/latents.pt and goes on where it stopped.
"""

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from demo.scenes import Scene, training_scenes
from demo.training.loop import write_atomically
from demo.training.patch_codec import WEIGHTS, images_of, load

LATENTS = WEIGHTS.with_name("latents.pt")
SEED = 7
BATCH = 16
SAVE_EVERY = 2000  # images


@torch.no_grad()
def prepare(encode: Callable[[Tensor], Tensor], count: int, file: Path = LATENTS) -> None:
    """Encode the first `count` scenes of one seed; saves {"latents": fp16 [N, bits, h, w], "scenes": [N]}."""
    latents: list[Tensor] = []
    scenes: list[Scene] = []
    if file.exists():
        saved = torch.load(file, weights_only=False)
        latents, scenes = [saved["latents"]], saved["scenes"]
    source = islice(training_scenes(SEED), len(scenes), count)
    rng = np.random.default_rng(len(scenes))
    while batch := list(islice(source, BATCH)):
        latents.append(encode(images_of(batch, rng)).half())
        scenes += batch
        if len(scenes) % SAVE_EVERY < BATCH or len(scenes) >= count:
            latents = [torch.cat(latents)]
            write_atomically({"latents": latents[0], "scenes": scenes}, file)
            print(f"{len(scenes)} scenes encoded", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=16000)
    args = parser.parse_args()
    prepare(load().encode, args.count)
