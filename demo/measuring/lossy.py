"""What each lossy option gives and costs on the demo: speed of the transformer loop, accuracy, likeness to dense.

`python -m demo.measuring.lossy`. Every option is a switch of the policy or of the build; the last ones stack. All are
engines of AOTInductor in bf16 unless the option says otherwise, drawn in turn, so that one run compares them.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import fastvar
from demo.bundles import CHECKPOINT, OUT, SAMPLING, SIZE, exit_on_user_error
from demo.measuring.score import evaluate
from demo.measuring.speed import RESULTS
from fastvar import Pipeline
from fastvar.core.policy import PruningPolicy, ScaleRule, policy_to_toml
from fastvar.core.schedule import parse_size
from fastvar.doctor import examine
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity_presets import schedule_for
from fastvar.profiling.environment import FACTS

DEPTH = 8  # layers of the demo model
SCHEDULE = schedule_for(parse_size(SIZE))
LAST = len(SCHEDULE) - 1
PUBLISHED, STRONG = (INFINITY.policy(name, SCHEDULE, DEPTH) for name in ("fastvar", "fastvar-strong"))


@dataclass(frozen=True)
class Option:
    """A policy, and how the layers' matrices are stored."""

    policy: PruningPolicy
    weights: str | None = None


def keeping(ratio: float) -> PruningPolicy:
    """The fastvar policy with another share of the last scale's tokens."""
    return replace(PUBLISHED, rules={**PUBLISHED.rules, LAST: ScaleRule(ratio)})


def without_text(policy: PruningPolicy) -> PruningPolicy:
    """The policy with the text out of the pruned layers of its last scale."""
    return replace(policy, rules={**policy.rules, LAST: replace(policy.rule(LAST), text=False)})


OPTIONS = {
    "dense": Option(INFINITY.policy("dense", SCHEDULE, DEPTH)),
    "fastvar": Option(PUBLISHED),
    "keep 0.15": Option(keeping(0.15)),
    "one selection a layer": Option(replace(PUBLISHED, shared_selection=True)),
    "no text at the last scale": Option(without_text(PUBLISHED)),
    "guidance off at the last scale": Option(STRONG),
    "int8 weights": Option(PUBLISHED, "int8"),
    "int8 weights and activations": Option(PUBLISHED, "w8a8"),
    "guidance off, int8 weights and activations": Option(STRONG, "w8a8"),
    "the same, one selection a layer": Option(replace(STRONG, shared_selection=True), "w8a8"),
    "the same, no text at the last scale": Option(without_text(replace(STRONG, shared_selection=True)), "w8a8"),
}


def load(name: str, option: Option, out: Path, threads: int | None) -> Pipeline:
    """Build an option, and open it."""
    folder = out / "lossy" / name.replace(", ", "-").replace(" ", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    policy = folder.with_suffix(".toml")
    policy.write_text(policy_to_toml(option.policy))
    fastvar.build(
        CHECKPOINT,
        size=SIZE,
        policy=str(policy),
        backend="aotinductor",
        precision="bf16",
        weights=option.weights,
        guidance="on",
        sampling=SAMPLING,
        out=folder,
    )
    return Pipeline.load(folder, threads=threads)


def table(result: dict[str, Any]) -> Table:
    """One row an option."""
    shown = Table("option", "scales, ms", "times dense", "accuracy", "PSNR to dense, dB", "SSIM to dense")
    for column in shown.columns[1:]:
        column.justify = "right"
    dense = result["scales_ms"]["dense"]
    for name, shares in result["accuracy"].items():
        spent, alike = result["scales_ms"][name], result["likeness"].get(name)
        cells = (f"{alike['psnr_db_median']:.1f}", f"{alike['ssim_mean']:.3f}") if alike else ()
        shown.add_row(name, f"{spent:.1f}", f"{dense / spent:.2f}", f"{shares['overall']:.3f}", *cells)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="number of held-out captions")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, and of the first image")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--options", nargs="+", choices=list(OPTIONS), default=list(OPTIONS), help="dense goes first")
    parser.add_argument("--json", type=Path, default=RESULTS / "demo-256x256-lossy.json", help="where the figures go")
    arguments = parser.parse_args()
    pipes = {
        name: load(name, option, OUT, arguments.threads)
        for name, option in OPTIONS.items()
        if name in arguments.options
    }
    result = evaluate(pipes, arguments.count, arguments.seed)
    Console().print(table(result))
    facts = examine()
    result["machine"] = {key: facts[key] for key in (*FACTS, "packages")}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.json}")


if __name__ == "__main__":
    exit_on_user_error(main)
