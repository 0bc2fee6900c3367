"""`make demo`: six captions that were never trained on, drawn dense and pruned at equal seeds, on one poster."""

import argparse
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from demo.bundles import CHECKPOINT, OUT, add_side, ensure_bundles, exit_on_user_error, square
from demo.measuring.speed import Runs, measure, scale_table, summarize
from demo.poster import Exhibit, hang
from demo.scenes import caption, held_out_scenes
from fastvar import Pipeline
from fastvar.profiling.environment import environment

PROMPTS = 6
SCENE_SEED, IMAGE_SEED = 3, 7
TIMED_RUNS = 3  # of every prompt


def held_out_captions(count: int, seed: int) -> list[str]:
    """Captions of scenes that no training saw."""
    rng = np.random.default_rng(seed)
    return [caption(scene, rng) for scene in held_out_scenes(count, seed)]


def prompt_times(runs: Runs, prompts: int) -> list[tuple[float, float]]:
    """Median milliseconds of a whole image of every prompt, dense and pruned; run i drew prompt i modulo `prompts`."""
    dense, pruned = (
        [median(timing.total_ms for timing in timings[i::prompts]) for i in range(prompts)] for timings in runs.values()
    )
    return list(zip(dense, pruned, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder in the official format")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the two bundles and the sheet")
    parser.add_argument("--runs", type=int, default=TIMED_RUNS, help="timed runs of each prompt, after one warm-up")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    add_side(parser)
    arguments = parser.parse_args()
    size = square(arguments.side)
    paths = ensure_bundles(arguments.out, checkpoint=arguments.checkpoint, size=size)
    pipes = {policy: Pipeline.load(path, threads=arguments.threads) for policy, path in paths.items()}
    captions = held_out_captions(PROMPTS, SCENE_SEED)
    images = {policy: pipe(captions, seed=IMAGE_SEED).images for policy, pipe in pipes.items()}
    runs = measure(pipes, captions, arguments.runs * len(captions))
    summary = summarize(runs)
    facts = environment(pipes["fastvar"].manifest)
    machine = f"{facts['cpu']}, {facts['cpu_cores']} cores, {facts['backend']}, {facts['precision']}, batch 1"
    exhibits = [
        Exhibit(text, dense, pruned, *times)
        for text, dense, pruned, times in zip(
            captions, images["dense"], images["fastvar"], prompt_times(runs, len(captions)), strict=True
        )
    ]
    sheet = paths["dense"].parent / "sheet.png"
    hang(exhibits, f"{size}; {machine}").save(sheet, optimize=True)
    Console().print(scale_table(summary))
    print(machine)
    print(
        f"pruned is {summary['speedup_scales']:.2f} times as fast over the scales, "
        f"{summary['speedup_total']:.2f} times over the whole image"
    )
    print(f"wrote {sheet}")


if __name__ == "__main__":
    exit_on_user_error(main)
