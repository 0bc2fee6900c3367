"""`fastvar sizes`: which image sizes there are, and what pruning spares at each."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import InputError
from .options import AsJson, print_json


def sizes(
    model: Annotated[str, typer.Option(help="Model whose layers the shares are counted for.")] = "infinity_2b",
    as_json: AsJson = False,
) -> None:
    """List every image size that --size takes, with its tokens and the share that the fastvar policy forwards."""
    from ..families.infinity import TRANSFORMERS

    if model not in TRANSFORMERS:
        raise InputError(f"no model size {model!r}", expected="one of " + ", ".join(TRANSFORMERS))
    facts = _size_facts(TRANSFORMERS[model].depth)
    if as_json:
        print_json({"model": model, "sizes": facts})
    else:
        Console().print(_size_table(facts, model))


def _size_facts(depth: int) -> list[dict[str, Any]]:
    """One entry per size, by shape from tall to wide, small to large."""
    from ..plan import DENSE, fastvar_policy, make_plan
    from ..schedule import all_schedules

    found = []
    for (height, width), schedule in sorted(all_schedules().items(), key=lambda item: (_shape(item[1]), item[0])):
        dense = make_plan(schedule, DENSE, depth)
        pruned = make_plan(schedule, fastvar_policy(schedule, depth), depth)
        found.append(
            {
                "size": f"{width}x{height}",
                "width": width,
                "height": height,
                "shape": round(_shape(schedule), 3),
                "budget": schedule.budget,
                "zero_shot": schedule.zero_shot,
                "scales": len(schedule),
                "last_grid": list(schedule.final),
                "tokens": sum(step.tokens for step in dense.steps),
                "forwarded_share": pruned.forwarded_tokens / dense.forwarded_tokens,
            }
        )
    return found


def _shape(schedule: Any) -> float:
    """Width over height of the 1M size of the same aspect ratio: the smaller ones are off by a few pixels."""
    height, width = schedule.position_grid
    return float(width / height)


def _size_table(facts: list[dict[str, Any]], model: str) -> Table:
    table = Table(
        caption=f"forwarded: share of tokens times layers that the fastvar policy computes ({model}); "
        "zero-shot: finer than any image a model was trained on"
    )
    for heading in ("shape", "size", "budget", "scales", "tokens", "forwarded", ""):
        table.add_column(heading, justify="right" if heading else "left")
    shape = None
    for entry in facts:
        if entry["shape"] != shape:
            table.add_section()
        first = f"{entry['shape']:.2f}" if entry["shape"] != shape else ""
        shape = entry["shape"]
        note = "zero-shot" if entry["zero_shot"] else ""
        share = f"{entry['forwarded_share']:.0%}"
        table.add_row(first, entry["size"], entry["budget"], str(entry["scales"]), str(entry["tokens"]), share, note)
    return table
