"""How cost grows with the image: tokens, operations, memory and milliseconds over sizes, dense beside pruned.

`python -m benchmarks.scaling` builds a model with random weights, which cost what trained ones do, for every
size in a process of its own; then draws dense and pruned in turn, warm-up excluded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.builder import GUIDED, RESULTS, ROOT, Builder
from benchmarks.contenders import Contender, EngineContender
from benchmarks.timing import timed_in_turn
from fastvar.core.dtypes import human_bytes
from fastvar.core.files import write_json, write_text
from fastvar.core.schedule import parse_size
from fastvar.doctor import examine
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.errors import FastvarError, InputError
from fastvar.families.infinity import TRANSFORMERS
from fastvar.families.infinity_presets import extended_schedules, official_schedules, schedule_for
from fastvar.profiling.environment import FACTS
from fastvar.profiling.estimates.costs import add, engine_costs
from fastvar.profiling.profiled_bundle import random_features
from fastvar.profiling.tuning.charts import Line, log_lines
from fastvar.runtime.memory.fit import device_need
from fastvar.runtime.memory.layout import build_layout

POLICIES = ("dense", "fastvar")
SIZES, PLANNED_SIZES = "256,512,768,1024", "1536,2048"  # drawn; and told from the plan alone
ROWS = 2  # guidance on
BETWEEN = (512, 1024)  # pixels a side: the steeper part of the curve
DECODER_RUNS = 2


@dataclass(frozen=True)
class Measured:
    """One size under one policy. Milliseconds are those of all scales; None where nothing was drawn."""

    pixels: int  # a side
    policy: str
    tokens: int  # of all scales that run, per guidance row
    forwarded_tokens: int  # through all layers
    flop: float
    cache_bytes: int  # keys and values
    plan_bytes: int  # everything beside the weights: caches, activations, decoder
    ms: float | None = None
    runs_ms: tuple[float, ...] = ()
    decoder_ms: float | None = None


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(TRANSFORMERS)}.")] = "infinity_layer12",
    sizes: Annotated[str, typer.Option(help="Pixels a side that are drawn, by commas.")] = SIZES,
    plan_sizes: Annotated[
        str | None,
        typer.Option(
            help=f"Sizes that are planned, not drawn; empty for none. [default: of {PLANNED_SIZES} those known]"
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed images of each policy and size, after one warm-up.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; the library's choice by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file; named by the model by default.")] = None,
    plot: Annotated[Path, typer.Option(help="SVG file.")] = ROOT / "docs" / "scaling.svg",
) -> None:
    """Measure how latency, operations and memory grow with the image."""
    try:
        drawn, planned = check_model(model, sizes, plan_sizes)
        with tempfile.TemporaryDirectory() as folder:
            bundles = Bundles(Path(folder), model)
            rows = [row for side in drawn for row in measure(bundles.at(side), side, runs, threads)]
            rows += [row for side in planned for row in measure(bundles.at(side), side, 0, threads)]
        data = record(model, rows, runs, threads)
        written = write_json(out or RESULTS / f"scaling-{model}.json", data)
        write_text(plot, scaling_plot(model, rows))
    except FastvarError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(markdown_table(rows))
    for line in slope_lines(data["slopes"]):
        typer.echo(line)
    typer.echo(f"wrote {written} and {plot}")


def check_model(model: str, sizes: str, plan_sizes: str | None) -> tuple[list[int], list[int]]:
    """Sizes that are drawn and that are planned, in rising order.

    Raises:
        InputError: no such model, or no size.
        PlanError: a size without a schedule.
    """
    if model not in TRANSFORMERS:
        raise InputError(f"no model size {model!r}", expected="one of " + ", ".join(TRANSFORMERS))
    drawn = _sides(sizes)
    if not drawn:
        raise InputError("no size to draw", expected="--sizes 256,512 say")
    if plan_sizes is None:
        known = official_schedules() | extended_schedules()
        return drawn, [side for side in _sides(PLANNED_SIZES, known) if side not in drawn]
    return drawn, [side for side in _sides(plan_sizes) if side not in drawn]


def _sides(text: str, known: Mapping[tuple[int, int], Any] | None = None) -> list[int]:
    """Squares by their side; of `known` sizes only, where it is given, else every one must have a schedule."""
    found = [parse_size(part) for part in text.split(",") if part.strip()]
    for size in found:
        if size[0] != size[1]:
            raise InputError(f"{size[1]}x{size[0]} is not square", expected="pixels a side")
    if known is None:
        return sorted({schedule_for(size).pixels[0] for size in found})
    return sorted({size[0] for size in found if size in known})


class Bundles:
    """Bundles of one model with random weights. The first is built; all others take over its weights."""

    def __init__(self, folder: Path, model: str) -> None:
        self._builder = Builder(folder, "onnxruntime", "cpu")
        self._model = model
        self._first: Bundle | None = None

    def at(self, side: int) -> dict[str, Bundle]:
        """Policy -> bundle."""
        return {policy: self._bundle(side, policy) for policy in POLICIES}

    def _bundle(self, side: int, policy: str) -> Bundle:
        name, wanted = f"{side}-{policy}", ("--size", str(side), "--policy", policy)
        if self._first is not None:
            return self._builder.like(self._first, name, *wanted)
        self._first = self._builder.cpu(name, "--random-weights", self._model, *wanted)
        return self._first


def measure(bundles: Mapping[str, Bundle], side: int, runs: int, threads: int | None = None) -> list[Measured]:
    """Figures of one size, policy by policy; drawn where there are runs."""
    planned = {policy: _planned(bundle.manifest, side, policy) for policy, bundle in bundles.items()}
    if not runs:
        return list(planned.values())
    contenders = {
        policy: EngineContender(bundle, random_features(bundle.manifest), GUIDED, threads)
        for policy, bundle in bundles.items()
    }
    timed = timed_in_turn(contenders, runs)
    spent = {policy: [run.scales_ms for run in found] for policy, found in timed.items()}
    decoder_ms = _decoder_ms(next(iter(contenders.values())))
    return [
        Measured(
            **{**vars(row), "ms": median(spent[policy]), "runs_ms": tuple(spent[policy]), "decoder_ms": decoder_ms}
        )
        for policy, row in planned.items()
    ]


def _planned(manifest: Manifest, side: int, policy: str) -> Measured:
    plan, costs = manifest.plan, engine_costs(manifest, ROWS)
    return Measured(
        pixels=side,
        policy=policy,
        tokens=sum(step.tokens for step in plan.steps),
        forwarded_tokens=plan.forwarded_tokens,
        flop=add(costs.by_scale().values()).flop,
        cache_bytes=costs.kv_cache_bytes,
        plan_bytes=device_need([build_layout(manifest, ROWS)]).arena_bytes,
    )


def _decoder_ms(contender: Contender) -> float:
    """It draws the same whatever the policy; the first of its runs warms up."""
    return median([contender.decode() for _ in range(DECODER_RUNS + 1)][1:])


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Least squares through logarithms: y grows as x to this power. None for fewer than two points."""
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points, np.float64)).T
    return float(np.polyfit(x, y, 1)[0])


def slopes(rows: Sequence[Measured]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Policy -> what grows -> exponent over the pixels of the image: over all sizes that were drawn, over all that
    were planned too, and between 512 and 1024 pixels a side.
    """
    values = {"ms": "latency", "flop": "flop", "forwarded_tokens": "forwarded tokens", "cache_bytes": "KV cache"}
    spans: dict[str, Callable[[Measured], bool]] = {
        "drawn": lambda row: row.ms is not None,
        "planned": lambda _: True,
        "512 to 1024": lambda row: BETWEEN[0] <= row.pixels <= BETWEEN[1],
    }
    return {
        policy: {
            label: {
                span: slope(_points([row for row in rows if row.policy == policy and inside(row)], name))
                for span, inside in spans.items()
                if not (name == "ms" and span == "planned")
            }
            for name, label in values.items()
        }
        for policy in POLICIES
    }


def _points(rows: Sequence[Measured], name: str) -> list[tuple[float, float]]:
    """(pixels of the image, value) where there is one."""
    values = ((float(row.pixels) ** 2, getattr(row, name)) for row in rows)
    return [(pixels, float(value)) for pixels, value in values if value is not None]


def slope_lines(found: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[str]:
    """Exponents in words, a line for each policy and quantity."""
    return [
        f"{policy}: {label} grows as pixels to the power "
        + ", ".join(f"{value:.2f} ({span})" for span, value in spans.items() if value is not None)
        for policy, quantities in found.items()
        for label, spans in quantities.items()
        if any(value is not None for value in spans.values())
    ]


def record(model: str, rows: Sequence[Measured], runs: int, threads: int | None) -> dict[str, Any]:
    """Everything, with hardware and versions."""
    facts = examine()
    return {
        "what": f"{model} with random weights, batch 1, guidance on, fp32 on onnxruntime; ms is the loop over scales, "
        "without text and decoder; flop its matrix products and attention",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {name: facts[name] for name in (*FACTS, "packages")},
        "threads": threads,
        "runs": runs,
        "sizes": [asdict(row) for row in rows],
        "slopes": slopes(rows),
    }


def markdown_table(rows: Sequence[Measured]) -> str:
    """One line a size and policy."""
    head = (
        "size",
        "policy",
        "tokens",
        "forwarded",
        "TFLOP",
        "KV cache",
        "memory",
        "scales, s",
        "times faster",
        "decoder, s",
    )
    dense = {row.pixels: row for row in rows if row.policy == "dense"}
    lines = [head, ("---",) * len(head), *(_cells(row, dense[row.pixels]) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Measured, dense: Measured) -> tuple[str, ...]:
    faster = f"{dense.ms / row.ms:.2f}" if row.ms and dense.ms else ""
    return (
        f"{row.pixels}x{row.pixels}",
        row.policy,
        f"{row.tokens:,}",
        f"{row.forwarded_tokens:,}",
        f"{row.flop / 1e12:.3g}",
        human_bytes(row.cache_bytes),
        human_bytes(row.plan_bytes),
        "" if row.ms is None else f"{row.ms / 1e3:.2f}",
        faster,
        "" if row.decoder_ms is None else f"{row.decoder_ms / 1e3:.2f}",
    )


def scaling_plot(model: str, rows: Sequence[Measured]) -> str:
    """SVG: seconds and operations over pixels, dense and pruned."""
    own = {policy: [row for row in rows if row.policy == policy] for policy in POLICIES}
    lines = [
        Line(f"{policy}, seconds", [(x, ms / 1e3) for x, ms in _points(own[policy], "ms")], colour)
        for colour, policy in enumerate(POLICIES)
    ]
    lines += [
        Line(f"{policy}, TFLOP", [(x, flop / 1e12) for x, flop in _points(own[policy], "flop")], colour, dashed=True)
        for colour, policy in enumerate(POLICIES)
    ]
    title = f"{model}: cost of all scales over image size"
    return log_lines(title, "image size, pixels", "seconds on this CPU; TFLOP", lines, lambda x: f"{round(x**0.5)}²")


if __name__ == "__main__":
    typer.run(main)
