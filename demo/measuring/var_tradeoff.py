"""Which keep ratios for VAR: quality and speed of pruning policies, measured on the demo's class-conditional model.

`python -m demo.measuring.var_tradeoff` draws every class with every policy at equal seeds, in turn. Classes are read
back from the pixels; likeness is that to the dense image. The arithmetic of the published sizes follows from their
shapes alone.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastvar
from demo.bundles import exit_on_user_error
from demo.measuring.speed import RESULTS
from demo.training.var.codec import CLASSES, only_shape
from demo.training.var.stages import OUT
from fastvar import Pipeline
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule, policy_to_toml
from fastvar.core.precision import Precision
from fastvar.core.schedule import ScaleSchedule
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.registry import backend_class
from fastvar.errors import CheckpointError
from fastvar.export.checkpoints.checkpoint import Checkpoint, load_transformer
from fastvar.export.checkpoints.random_weights import random_checkpoint
from fastvar.export.describe import describe
from fastvar.export.options import BuildOptions
from fastvar.families.base import SamplingDefaults, TransformerShape
from fastvar.families.var import VarConfig
from fastvar.profiling.environment import environment
from fastvar.profiling.estimates.costs import engine_costs
from fastvar.profiling.tuning.metrics import Pixels, psnr, ssim

SIZE = "256x256"
SAMPLING = SamplingDefaults(guidance_scale=3.0, tau=None, top_p=0.8, top_k=0)
PUBLISHED = ("var_d30", "var_d36s")
GUIDANCE_ROWS = 2


def keeping(*ratios: float, depth: int, scales: int, first_layer: int = 0, guided: bool = True) -> PruningPolicy:
    """Prune as many last scales as there are ratios, in layers [first_layer, depth), restored from the one before."""
    first = scales - len(ratios)
    rules = {first + i: ScaleRule(ratio, guidance=guided or first + i < scales - 1) for i, ratio in enumerate(ratios)}
    return PruningPolicy("", rules, first_layer, depth, first - 1)


def policies(schedule: ScaleSchedule, depth: int) -> dict[str, PruningPolicy]:
    """What is compared, by name; keep ratios from the first pruned scale to the last."""
    prune = partial(keeping, depth=depth, scales=len(schedule))
    last = len(schedule) - 1
    ratios = (
        (0.75,),
        (0.5,),
        (0.25,),
        (0.75, 0.5),
        (0.5, 0.5),
        (0.5, 0.25),
        (0.75, 0.5, 0.25),
    )
    return {
        "dense": DENSE,
        **{"keep " + ", ".join(f"{ratio:g}" for ratio in own): prune(*own) for own in ratios},
        "keep 0.5, 0.25 from layer 2": prune(0.5, 0.25, first_layer=2),
        "last scale left out": PruningPolicy("", {last: ScaleRule(skip=True)}),
        "guidance off at the last scale": PruningPolicy("", {last: ScaleRule(guidance=False)}),
        "keep 0.5, guidance off at the last scale": prune(0.5, guided=False),
    }


@dataclass
class Drawn:
    """What one policy has drawn, image by image, in the order of all policies."""

    right: list[bool] = field(default_factory=list)  # colour and kind of the only shape
    color_right: list[bool] = field(default_factory=list)
    scales_ms: list[float] = field(default_factory=list)
    psnr_db: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)

    def add(self, image: Pixels, reference: Pixels, label: int, spent_ms: float) -> None:
        shape, (color, kind) = only_shape(image), CLASSES[label].split()
        self.color_right.append(shape is not None and shape.color == color)
        self.right.append(shape is not None and (shape.color, shape.kind) == (color, kind))
        self.scales_ms.append(spent_ms)
        self.psnr_db.append(psnr(image, reference))
        self.ssim.append(ssim(image, reference))

    def summary(self, dense: "Drawn") -> dict[str, Any]:
        """Accuracy and its pairs with dense (what was lost, what was won), likeness, and time against dense.

        The speed is a median of pairs: neighbours in time meet the same load of the machine.
        """
        pairs = list(zip(dense.right, self.right, strict=True))
        return {
            "accuracy": float(np.mean(self.right)),
            "color_accuracy": float(np.mean(self.color_right)),
            "lost": sum(before and not after for before, after in pairs),
            "won": sum(after and not before for before, after in pairs),
            "psnr_db_median": None if self is dense else float(np.median(self.psnr_db)),
            "ssim_mean": float(np.mean(self.ssim)),
            "scales_ms": median(self.scales_ms),
            "times_dense": median(b / a for b, a in zip(dense.scales_ms, self.scales_ms, strict=True)),
        }


def measure(pipes: Mapping[str, Pipeline], count: int, seed: int, minutes: float) -> dict[str, Drawn]:
    """Draw `count` images with every pipeline, dense first, the classes in turn; image i has seed + i.

    Stops early, after a whole image of all, when the minutes are over.
    """
    drawn = {name: Drawn() for name in pipes}
    for pipe in pipes.values():
        pipe(class_labels=0, seed=seed)  # warms up
    end = time.monotonic() + minutes * 60
    for i in track(range(count), "drawing", transient=True):
        if i and time.monotonic() > end:
            break
        label, reference = i % len(CLASSES), None
        for name, pipe in pipes.items():
            output = pipe(class_labels=label, seed=seed + i)
            image = np.asarray(output.images[0])
            reference = image if reference is None else reference
            drawn[name].add(image, reference, label, output.timings[0].scales_ms)
    return drawn


@cache
def published_checkpoint(name: str) -> Checkpoint:
    return random_checkpoint(name)


def published_flop(name: str) -> dict[str, float]:
    """Policy -> FLOP of all scales of a published size relative to dense."""
    checkpoint = published_checkpoint(name)
    transformer, family = checkpoint.transformer, checkpoint.family
    schedule, flop = _schedule(transformer), {}
    for policy_name, policy in policies(schedule, transformer.depth).items():
        plan = family.plan(schedule, policy, transformer)
        flop[policy_name] = scales_flop(
            describe(checkpoint, plan, backend_class("onnxruntime"), Precision(), BuildOptions(guidance="on"))
        )
    return {policy_name: own / flop["dense"] for policy_name, own in flop.items()}


def _schedule(transformer: TransformerShape) -> ScaleSchedule:
    assert isinstance(transformer, VarConfig)
    return transformer.schedule


def scales_flop(manifest: Manifest) -> int:
    """FLOP of all scales of one image with guidance."""
    return sum(cost.flop for cost in engine_costs(manifest, GUIDANCE_ROWS).by_scale().values())


def load(name: str, policy: PruningPolicy, checkpoint: Path, threads: int | None) -> Pipeline:
    """Build a policy's bundle, and open it."""
    folder = checkpoint / "bundles" / name.replace(", ", "-").replace(" ", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(folder.suffix + ".toml")
    file.write_text(policy_to_toml(policy))
    fastvar.build(checkpoint, size=SIZE, policy=str(file), guidance="on", sampling=SAMPLING, out=folder)
    return Pipeline.load(folder, threads=threads)


COLUMNS = (
    "policy",
    "class",
    "lost / won",
    "colour",
    "PSNR, dB",
    "SSIM",
    "times dense",
    "FLOP",
    *(f"FLOP {name}" for name in PUBLISHED),
)


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a policy, as text."""
    published = [result["published_flop"][name] for name in PUBLISHED]
    return [
        (
            name,
            f"{own['accuracy']:.3f}",
            f"{own['lost']} / {own['won']}",
            f"{own['color_accuracy']:.3f}",
            "" if own["psnr_db_median"] is None else f"{own['psnr_db_median']:.1f}",
            f"{own['ssim_mean']:.3f}",
            f"{own['times_dense']:.2f}",
            f"{own['flop']:.2f}",
            *(f"{shares[name]:.2f}" for shares in published),
        )
        for name, own in result["policies"].items()
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The same table for a document."""
    lines = [COLUMNS, ("---", *("---:" for _ in COLUMNS[1:])), *rows(result)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(result: Mapping[str, Any]) -> Table:
    shown = Table(*COLUMNS)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows(result):
        shown.add_row(*row)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=OUT, help="folder that `python -m demo.training.var` writes")
    parser.add_argument("--per-class", type=int, default=20, help="images of each class")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    parser.add_argument("--json", type=Path, default=RESULTS / "var-tradeoff.json", help="where the figures go")
    parser.add_argument("--minutes", type=float, default=60, help="wall clock to draw for, at most")
    arguments = parser.parse_args()
    if arguments.per_class < 1:
        parser.error("--per-class must be at least 1")
    if not (arguments.checkpoint / "transformer.pth").is_file():
        raise CheckpointError(
            f"no transformer in {arguments.checkpoint}",
            expected="transformer.pth",
            fix="train it with `python -m demo.training.var`",
        )
    published = {name: published_flop(name) for name in PUBLISHED}
    transformer, _ = load_transformer(arguments.checkpoint)
    pipes = {
        name: load(name, policy, arguments.checkpoint, arguments.threads)
        for name, policy in policies(_schedule(transformer), transformer.depth).items()
    }
    drawn = measure(pipes, arguments.per_class * len(CLASSES), arguments.seed, arguments.minutes)
    flop = {name: scales_flop(pipe.manifest) for name, pipe in pipes.items()}
    dense = pipes["dense"].manifest
    result = {
        "what": f"{len(drawn['dense'].right)} images of {len(CLASSES)} classes in turn, batch 1; times of scales alone",
        "seed": arguments.seed,
        "threads": arguments.threads,
        "sampling": vars(dense.sampling),
        "environment": environment(dense),
        "policies": {
            name: {**own.summary(drawn["dense"]), "flop": flop[name] / flop["dense"]} for name, own in drawn.items()
        },
        "published_flop": published,
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table(result))
    print(markdown(result))
    print(f"wrote {arguments.json}")


if __name__ == "__main__":
    exit_on_user_error(main)
