"""Super-resolution of held-out scenes: PSNR against the true render, for ours, for bicubic, and for what bounds us.

`python -m demo.measuring.upscale` writes benchmarks/results/ and docs/upscale.png. Nothing is tuned on these scenes:
the sampling settings are the bundle's.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from demo.bands import compose
from demo.bundles import OUT, POLICIES, ROOT, ensure_bundles, exit_on_user_error
from demo.draw_scene import BASE_SIDE, render
from demo.measuring.speed import RESULTS
from demo.scenes import caption, held_out_scenes
from fastvar import Pipeline
from fastvar.profiling.environment import environment
from fastvar.profiling.tuning.metrics import psnr
from fastvar.runtime.editing.edits import back_projected

SCENES, SEED = 50, 0
FACTORS = (2, 4, 8)
SHOWN, SHOWN_FACTOR = (1, 4, 9), 4  # scenes on the sheet
SHEET = ROOT.parent / "docs" / "upscale.png"
PIXELS = (BASE_SIDE, BASE_SIDE)
BASELINE, CONTROL = "bicubic", "bicubic, consistent"
OURS, RAW, UNDRAWN = "ours", "ours, not consistent", "no token drawn"
Images = dict[str, Image.Image]


def reduced(truth: np.ndarray, factor: int) -> Image.Image:
    """Every pixel the mean of factor x factor true ones, rounded to 8 bits."""
    side = truth.shape[0] // factor
    means = truth.reshape(side, factor, side, factor, 3).mean((1, 3))
    return Image.fromarray(np.rint(means).astype(np.uint8))


def enlarged(small: Image.Image) -> Images:
    """What needs no model: by Pillow, and bicubic made consistent by the same back-projection as ours."""
    kernels = Image.Resampling
    bicubic = small.resize(PIXELS, kernels.BICUBIC)
    return {
        "nearest": small.resize(PIXELS, kernels.NEAREST),
        BASELINE: bicubic,
        CONTROL: back_projected(bicubic, small),
    }


def upscaled(pipe: Pipeline, small: Image.Image, text: str, seed: int) -> Images:
    """Ours from the same small image, before and after back-projection, which is what a call returns."""
    raw = pipe.upscale(small, text, seed=seed, consistency=False).images[0]
    return {RAW: raw, OURS: back_projected(raw, small)}


def coded(pipe: Pipeline, truth: np.ndarray, small: Image.Image, text: str) -> Images:
    """Encoder, quantiser and decoder alone, no token drawn: on the small image enlarged, which says what drawing adds;
    and on the true one, the ceiling of what it can add.
    """
    scales = len(pipe.manifest.plan.schedule)
    read = pipe.upscale(small, text, keep_scales=scales).images[0]
    trip = pipe.upscale(Image.fromarray(truth), text, keep_scales=scales, consistency=False).images[0]
    return {UNDRAWN: read, "true tokens, not consistent": trip, "true tokens": back_projected(trip, small)}


def measure(pipe: Pipeline, count: int, factor: int, seed: int = SEED) -> tuple[dict[str, list[float]], list[Images]]:
    """PSNR in dB of every method on `count` held-out scenes, and the images that belong on the sheet."""
    rng = np.random.default_rng(seed)
    scores: dict[str, list[float]] = {}
    shown: list[Images] = []
    for i, scene in enumerate(track(held_out_scenes(count, seed), f"{factor} times", transient=True)):
        truth, text = render(scene), caption(scene, rng)
        small = reduced(truth, factor)
        found = enlarged(small) | upscaled(pipe, small, text, seed + i) | coded(pipe, truth, small, text)
        for name, image in found.items():
            scores.setdefault(name, []).append(psnr(np.asarray(image), truth))
        if i in SHOWN:
            shown.append({"input": found["nearest"], **found, "truth": Image.fromarray(truth)})
    return scores, shown


def summary(scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Mean and median PSNR of every method, and on how many scenes it beats bicubic and consistent bicubic."""

    def wins(name: str, other: str) -> int:
        return sum(a > b for a, b in zip(scores[name], scores[other], strict=True))

    return {
        name: {
            "psnr_db_mean": float(np.mean(values)),
            "psnr_db_median": float(np.median(values)),
            "better_than_bicubic": wins(name, BASELINE),
            "better_than_consistent_bicubic": wins(name, CONTROL),
        }
        for name, values in scores.items()
    }


def table(title: str, found: Mapping[str, Mapping[str, float]]) -> Table:
    shown = Table("method", "mean, dB", "median, dB", "beats bicubic", "and consistent", title=title)
    for column in shown.columns[1:]:
        column.justify = "right"
    for name, values in found.items():
        levels = (f"{values[key]:.2f}" for key in ("psnr_db_mean", "psnr_db_median"))
        wins = (str(values[f"better_than_{key}"]) for key in ("bicubic", "consistent_bicubic"))
        shown.add_row(name, *levels, *wins)
    return shown


def sheet(shown: Sequence[Images]) -> Image.Image:
    rng = np.random.default_rng(SEED)
    captions = [caption(scene, rng) for scene in held_out_scenes(max(SHOWN) + 1, SEED)]
    rows = {name: [images[name] for images in shown] for name in ("input", BASELINE, OURS, "truth")}
    return compose(rows, [captions[i] for i in SHOWN])


def run(pipes: Mapping[str, Pipeline], count: int, report: Callable[[Table], None]) -> tuple[dict[str, Any], Any]:
    """Every policy at every factor; the figures, and the images for the sheet."""
    figures: dict[str, Any] = {}
    on_sheet: list[Images] = []
    for policy, pipe in pipes.items():
        for factor in FACTORS:
            scores, shown = measure(pipe, count, factor)
            found = summary(scores)
            figures.setdefault(policy, {})[f"x{factor}"] = found
            side = BASE_SIDE // factor
            report(table(f"{policy}, {side}x{side} to {BASE_SIDE}x{BASE_SIDE}, {count} scenes", found))
            on_sheet = shown if factor == SHOWN_FACTOR else on_sheet
    return figures, on_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=SCENES, help="number of held-out scenes")
    parser.add_argument("--bundles", type=Path, default=OUT, help="folder of the two bundles; built where missing")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    parser.add_argument("--json", type=Path, default=RESULTS / "demo-upscale.json", help="where the figures go")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="where the images go")
    arguments = parser.parse_args()
    if arguments.count <= max(SHOWN):
        parser.error(f"--count must be more than {max(SHOWN)}: the sheet shows that scene")
    paths = ensure_bundles(arguments.bundles)
    pipes = {policy: Pipeline.load(paths[policy], threads=arguments.threads) for policy in POLICIES}
    figures, shown = run(pipes, arguments.count, Console().print)
    first = next(iter(pipes.values()))
    record = {
        "what": "PSNR in dB against the true 256x256 render, from its area-averaged reduction, caption as prompt",
        "scenes": arguments.count,
        "seed": SEED,
        "sampling": vars(first.manifest.sampling),
        "environment": environment(first.manifest),
        "policies": figures,
    }
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    sheet(shown).save(arguments.sheet, optimize=True)
    print(f"wrote {arguments.json} and {arguments.sheet}")


if __name__ == "__main__":
    exit_on_user_error(main)
