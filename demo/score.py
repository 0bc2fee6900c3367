"""Scores the demo on captions that were never trained on, dense and pruned side by side.

Accuracy is read back from the pixels by `demo.read_scene`; PSNR and SSIM compare pruned with dense at equal seeds.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from demo.bundles import OUT, POLICIES, ensure_bundles, exit_on_user_error
from demo.read_scene import ATTRIBUTES, read_scene, score
from demo.scenes import Scene, caption, held_out_scenes
from fastvar import Pipeline

Pixels = NDArray[np.uint8]  # [H, W, 3]
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # the 11x11 Gaussian window of Wang et al. 2004
LUMA = np.array([0.299, 0.587, 0.114])


def accuracy(images: Iterable[Pixels], scenes: Iterable[Scene]) -> dict[str, float]:
    """Share of correct readings per attribute, and `overall`: all correct over all readings."""
    sums = dict.fromkeys(ATTRIBUTES, np.zeros(2, int))  # correct, total; some totals of one scene are 0
    for image, scene in zip(images, scenes, strict=True):
        for name, counts in score(read_scene(image), scene).items():
            sums[name] = sums[name] + counts
    shares = {name: _share(counts) for name, counts in sums.items()}
    return {**shares, "overall": _share(np.sum(list(sums.values()), axis=0))}


def _share(counts: NDArray[np.int_]) -> float:
    correct, total = counts
    return float(correct / total) if total else float("nan")


def psnr(image: Pixels, reference: Pixels) -> float:
    """Peak signal to noise ratio in decibels; infinite for equal images."""
    error = np.mean((image.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def ssim(image: Pixels, reference: Pixels) -> float:
    """Structural similarity of the luma (Wang et al. 2004), mean over all windows that lie inside the image."""
    x, y = (np.asarray(pixels, np.float64) @ LUMA for pixels in (image, reference))  # [H, W]
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _windowed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Gaussian mean of every whole window: [H, W] -> [H - 10, W - 10]."""
    offsets = np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)
    kernel = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(values, len(kernel), axis)
        values = windows @ (kernel / kernel.sum())
    return values


def likeness(images: Sequence[Pixels], references: Sequence[Pixels]) -> dict[str, Any]:
    """PSNR (median, for equal images are infinite) and SSIM (mean) over pairs, and how many are equal."""
    pairs = list(zip(images, references, strict=True))
    return {
        "psnr_db_median": float(np.median([psnr(*pair) for pair in pairs])),
        "ssim_mean": float(np.mean([ssim(*pair) for pair in pairs])),
        "identical": sum(bool(np.array_equal(*pair)) for pair in pairs),
    }


def evaluate(pipes: Mapping[str, Pipeline], count: int, seed: int, **settings: float | None) -> dict[str, Any]:
    """Draw the captions of `count` held-out scenes with every pipeline, image i with seed + i, and score them.

    Every pipeline is compared with the first.
    """
    rng = np.random.default_rng(seed)
    scenes = held_out_scenes(count, seed)
    captions = [caption(scene, rng) for scene in scenes]
    images: dict[str, list[Pixels]] = {policy: [] for policy in pipes}
    for i, text in enumerate(track(captions, "drawing", transient=True)):
        for policy, pipe in pipes.items():
            output = pipe(text, seed=seed + i, **settings)
            images[policy].append(np.asarray(output.images[0]))
    first, *others = images
    return {
        "captions": count,
        "seed": seed,
        "settings": {name: output.settings[name] for name in ("guidance_scale", "tau", "top_p")},
        "accuracy": {policy: accuracy(found, scenes) for policy, found in images.items()},
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
    settings = {"guidance_scale": arguments.guidance_scale, "tau": arguments.tau}
    result = evaluate(pipes, arguments.count, arguments.seed, **settings)
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
