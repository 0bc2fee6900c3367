"""Scores the demo on captions that were never trained on, and that no policy was chosen on, dense beside what is lossy.

Accuracy is read back from the pixels by `demo.read_scene`, with 95 % intervals by bootstrap over the scenes; PSNR and
SSIM compare with dense at equal seeds; Frechet's distance compares with true renders of the same scenes (features.py).
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from demo.bundles import CHECKPOINT, OUT, POLICIES, VARIANTS, add_side, ensure_bundles, exit_on_user_error, square
from demo.draw_scene import render
from demo.measuring.features import distance_to_truth
from demo.measuring.intervals import ratio_interval, share_intervals
from demo.measuring.splits import TUNING_COUNT, scored_scenes, tuning_scenes
from demo.read_caption import read_caption
from demo.read_scene import ATTRIBUTES, read_scene, score
from demo.scenes import RICH, SHIPPED, SIMPLE, Scene, World, caption, held_out_scenes
from fastvar import Pipeline
from fastvar.errors import InputError
from fastvar.profiling.tuning.metrics import Pixels, psnr, ssim
from fastvar.runtime.requests.params import SamplingParams

OVERALL = "overall"
NAMES = (*ATTRIBUTES, OVERALL)
WORLDS = {"simple": SIMPLE, "rich": RICH}
SCORED_COUNT, SCORED_SEED = 500, 1


def readings(images: Iterable[Pixels], scenes: Iterable[Scene], world: World = SHIPPED) -> NDArray[np.int_]:
    """Correct and all readings of every scene, for each of `NAMES`: [N, 9, 2]; some totals of one scene are 0."""
    counts = [
        list(score(read_scene(image, world), scene).values()) for image, scene in zip(images, scenes, strict=True)
    ]
    own = np.array(counts)  # [N, 8, 2], in the order of ATTRIBUTES
    return np.concatenate((own, own.sum(1, keepdims=True)), axis=1)


def accuracy(images: Iterable[Pixels], scenes: Iterable[Scene], world: World = SHIPPED) -> dict[str, float]:
    """Share of correct readings per attribute, and `overall`: all correct over all readings."""
    return _shares(readings(images, scenes, world))


def _shares(counts: NDArray[np.int_]) -> dict[str, float]:
    return {name: _share(own) for name, own in zip(NAMES, counts.sum(0), strict=True)}


def caption_accuracy(images: Sequence[Pixels], captions: Sequence[str]) -> float:
    """Overall accuracy of images drawn for captions in the words of `demo.scenes`: a scorer for `fastvar tune`.

    Raises:
        InputError: a prompt is not such a caption.
    """
    try:
        scenes = [read_caption(text) for text in captions]
    except ValueError as error:
        raise InputError(str(error), expected="captions as `demo.scenes` writes them") from error
    return accuracy(images, scenes)[OVERALL]


def _share(counts: NDArray[np.int_]) -> float:
    correct, total = counts
    return float(correct / total) if total else float("nan")


def likeness(images: Sequence[Pixels], references: Sequence[Pixels]) -> dict[str, Any]:
    """PSNR (median, for equal images are infinite) and SSIM (mean) over pairs, and how many are equal."""
    pairs = list(zip(images, references, strict=True))
    return {
        "psnr_db_median": float(np.median([psnr(*pair) for pair in pairs])),
        "ssim_mean": float(np.mean([ssim(*pair) for pair in pairs])),
        "identical": sum(bool(np.array_equal(*pair)) for pair in pairs),
    }


def evaluate(
    pipes: Mapping[str, Pipeline],
    count: int,
    seed: int,
    params: SamplingParams | None = None,
    *,
    scenes: list[Scene] | None = None,
    world: World = SHIPPED,
) -> dict[str, Any]:
    """Draw the captions of `count` held-out scenes with every pipeline, image i with seed + i, and score them.

    Every pipeline is compared with the first. `scales_ms` are medians of all scales of an image.

    Args:
        scenes: others than the first held-out ones of the seed.
        world: that of the model.
    """
    rng = np.random.default_rng(seed)
    scenes = held_out_scenes(count, seed, world) if scenes is None else scenes
    captions = [caption(scene, rng) for scene in scenes]
    images: dict[str, list[Pixels]] = {policy: [] for policy in pipes}
    spent: dict[str, list[float]] = {policy: [] for policy in pipes}
    for i, text in enumerate(track(captions, "drawing", transient=True)):
        for policy, pipe in pipes.items():
            output = pipe(text, params, seed=seed + i)
            images[policy].append(np.asarray(output.images[0]))
            spent[policy].append(output.timings[0].scales_ms)
    first, *others = images
    counts = {policy: readings(found, scenes, world) for policy, found in images.items()}
    side = len(images[first][0])
    truth = [render(scene, side, rng) for scene in scenes]
    return {
        "captions": len(scenes),
        "seed": seed,
        "settings": {name: output.settings[name] for name in ("guidance_scale", "tau", "top_p")},
        "accuracy": {policy: _shares(own) for policy, own in counts.items()},
        "intervals": {policy: dict(zip(NAMES, share_intervals(own), strict=True)) for policy, own in counts.items()},
        "share_of_first": {policy: ratio_interval(counts[policy][:, -1], counts[first][:, -1]) for policy in others},
        "distance_to_truth": {policy: distance_to_truth(found, truth, world) for policy, found in images.items()},
        "scales_ms": {policy: median(times) for policy, times in spent.items()},
        "likeness": {policy: likeness(images[policy], images[first]) for policy in others},
    }


def accuracy_table(result: Mapping[str, Any]) -> Table:
    """Accuracy and its 95 % interval: one row per attribute, one column per policy."""
    table = Table("attribute")
    for policy in result["accuracy"]:
        table.add_column(policy, justify="right")
    for name in NAMES:
        if name == OVERALL:
            table.add_section()
        cells = []
        for policy, shares in result["accuracy"].items():
            low, high = result["intervals"][policy][name]
            cells.append(f"{shares[name]:.3f} ({low:.3f} to {high:.3f})")
        table.add_row(name, *cells)
    return table


def likeness_table(result: Mapping[str, Any]) -> Table:
    """What else tells policies apart: one row per policy."""
    shown = Table("policy", "share of dense accuracy", "PSNR, dB", "SSIM", "distance to truth", "scales, ms")
    for column in shown.columns[1:]:
        column.justify = "right"
    dense, *_ = result["accuracy"].values()
    for policy, shares in result["accuracy"].items():
        distance, spent = f"{result['distance_to_truth'][policy]:.2f}", f"{result['scales_ms'][policy]:.0f}"
        if policy not in result["likeness"]:
            shown.add_row(policy, "", "", "", distance, spent)
            continue
        low, high = result["share_of_first"][policy]
        alike, share = result["likeness"][policy], shares[OVERALL] / dense[OVERALL]
        cells = f"{alike['psnr_db_median']:.1f}", f"{alike['ssim_mean']:.3f}"
        shown.add_row(policy, f"{share:.3f} ({low:.3f} to {high:.3f})", *cells, distance, spent)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=SCORED_COUNT, help="number of held-out captions")
    parser.add_argument("--seed", type=int, default=SCORED_SEED, help="of the scenes, and of the first image")
    parser.add_argument(
        "--tuning", action="store_true", help=f"the first of the {TUNING_COUNT} captions that policies were chosen on"
    )
    parser.add_argument("--guidance-scale", type=float, help="the bundle's by default")
    parser.add_argument("--tau", type=float, help="the bundle's by default")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        default=POLICIES,
        help="which are scored, dense first",
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder in the official format")
    parser.add_argument("--world", choices=list(WORLDS), help="what it was trained on; the shipped one's by default")
    parser.add_argument("--bundles", type=Path, default=OUT, help="folder of the bundles; built where missing")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    add_side(parser)
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error("--count must be at least 1")
    world = WORLDS[arguments.world] if arguments.world else SHIPPED
    scenes = (
        tuning_scenes(world)[: arguments.count]
        if arguments.tuning
        else scored_scenes(arguments.count, arguments.seed, world)
    )
    paths = ensure_bundles(
        arguments.bundles,
        checkpoint=arguments.checkpoint,
        size=square(arguments.side),
        variants=arguments.variants,
    )
    pipes = {name: Pipeline.load(path, threads=arguments.threads) for name, path in paths.items()}
    params = SamplingParams(guidance_scale=arguments.guidance_scale, tau=arguments.tau)
    seed = 0 if arguments.tuning else arguments.seed
    result = evaluate(pipes, len(scenes), seed, params, scenes=scenes, world=world)
    Console().print(accuracy_table(result))
    Console().print(likeness_table(result))
    chosen = "that policies were chosen on" if arguments.tuning else "that no policy was chosen on"
    settings = ", ".join(f"{name} {value:g}" for name, value in result["settings"].items())
    print(f"{len(scenes)} held-out captions {chosen}, {settings}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"tuning_split": arguments.tuning, **result}, indent=1) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
