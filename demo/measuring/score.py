"""Scores the demo on captions that were never trained on, dense and pruned side by side.

Accuracy is read back from the pixels by `demo.read_scene`; PSNR and SSIM compare pruned with dense at equal seeds.
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

from demo.bundles import OUT, POLICIES, ensure_bundles, exit_on_user_error
from demo.read_caption import read_caption
from demo.read_scene import ATTRIBUTES, read_scene, score
from demo.scenes import Scene, caption, held_out_scenes
from fastvar import Pipeline
from fastvar.errors import InputError
from fastvar.profiling.tuning.metrics import Pixels, psnr, ssim
from fastvar.runtime.requests.params import SamplingParams


def accuracy(images: Iterable[Pixels], scenes: Iterable[Scene]) -> dict[str, float]:
    """Share of correct readings per attribute, and `overall`: all correct over all readings."""
    sums = dict.fromkeys(ATTRIBUTES, np.zeros(2, int))  # correct, total; some totals of one scene are 0
    for image, scene in zip(images, scenes, strict=True):
        for name, counts in score(read_scene(image), scene).items():
            sums[name] = sums[name] + counts
    shares = {name: _share(counts) for name, counts in sums.items()}
    return {**shares, "overall": _share(np.sum(list(sums.values()), axis=0))}


def caption_accuracy(images: Sequence[Pixels], captions: Sequence[str]) -> float:
    """Overall accuracy of images drawn for captions in the words of `demo.scenes`: a scorer for `fastvar tune`.

    Raises:
        InputError: a prompt is not such a caption.
    """
    try:
        scenes = [read_caption(text) for text in captions]
    except ValueError as error:
        raise InputError(str(error), expected="captions as `demo.scenes` writes them") from error
    return accuracy(images, scenes)["overall"]


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
    pipes: Mapping[str, Pipeline], count: int, seed: int, params: SamplingParams | None = None
) -> dict[str, Any]:
    """Draw the captions of `count` held-out scenes with every pipeline, image i with seed + i, and score them.

    Every pipeline is compared with the first. `scales_ms` are medians of all scales of an image.
    """
    rng = np.random.default_rng(seed)
    scenes = held_out_scenes(count, seed)
    captions = [caption(scene, rng) for scene in scenes]
    images: dict[str, list[Pixels]] = {policy: [] for policy in pipes}
    spent: dict[str, list[float]] = {policy: [] for policy in pipes}
    for i, text in enumerate(track(captions, "drawing", transient=True)):
        for policy, pipe in pipes.items():
            output = pipe(text, params, seed=seed + i)
            images[policy].append(np.asarray(output.images[0]))
            spent[policy].append(output.timings[0].scales_ms)
    first, *others = images
    return {
        "captions": count,
        "seed": seed,
        "settings": {name: output.settings[name] for name in ("guidance_scale", "tau", "top_p")},
        "accuracy": {policy: accuracy(found, scenes) for policy, found in images.items()},
        "scales_ms": {policy: median(times) for policy, times in spent.items()},
        "likeness": {policy: likeness(images[policy], images[first]) for policy in others},
    }


def accuracy_table(result: Mapping[str, Any]) -> Table:
    """Accuracy: one row per attribute, one column per policy."""
    table = Table("attribute")
    for policy in result["accuracy"]:
        table.add_column(policy, justify="right")
    for name in (*ATTRIBUTES, "overall"):
        if name == "overall":
            table.add_section()
        table.add_row(name, *(f"{shares[name]:.3f}" for shares in result["accuracy"].values()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="number of held-out captions")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, and of the first image")
    parser.add_argument("--guidance-scale", type=float, help="the bundle's by default")
    parser.add_argument("--tau", type=float, help="the bundle's by default")
    parser.add_argument("--bundles", type=Path, default=OUT, help="folder of the two bundles; built where missing")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error("--count must be at least 1")
    paths = ensure_bundles(arguments.bundles)
    pipes = {policy: Pipeline.load(paths[policy], threads=arguments.threads) for policy in POLICIES}
    params = SamplingParams(guidance_scale=arguments.guidance_scale, tau=arguments.tau)
    result = evaluate(pipes, arguments.count, arguments.seed, params)
    Console().print(accuracy_table(result))
    alike, overall = (
        result["likeness"]["fastvar"],
        {policy: found["overall"] for policy, found in result["accuracy"].items()},
    )
    print(f"{arguments.count} held-out captions, " + ", ".join(f"{k} {v:g}" for k, v in result["settings"].items()))
    print(f"pruned keeps {overall['fastvar'] / overall['dense']:.1%} of the dense accuracy")
    print(f"pruned against dense at equal seeds: PSNR {alike['psnr_db_median']:.1f} dB, SSIM {alike['ssim_mean']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    exit_on_user_error(main)
