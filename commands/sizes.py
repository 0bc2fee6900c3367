"""`fastvar sizes`: which image sizes there are, and what pruning spares at each."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from ..console.options import AsJson, print_json, print_tables
from ..families import DEFAULT_MODEL, family_of, named_transformer, published_sizes


def sizes(
    model: Annotated[
        str, typer.Option(help=f"Model whose sizes are listed: {', '.join(published_sizes())}.")
    ] = DEFAULT_MODEL,
    as_json: AsJson = False,
) -> None:
    """List every image size that a model draws, with its tokens and the share that the fastvar policy forwards."""
    facts = _size_facts(named_transformer(model))
    if as_json:
        print_json({"model": model, "sizes": facts})
    else:
        print_tables(_size_table(facts, model))


def _size_facts(model: Any) -> list[dict[str, Any]]:
    """One entry per size, by shape from tall to wide, small to large."""
    from ..core.policy import DENSE

    family, found = family_of(model), []
    schedules = family.schedules(model)
    for (height, width), schedule in sorted(schedules.items(), key=lambda item: (_shape(item[1]), item[0])):
        dense = family.plan(schedule, DENSE, model)
        pruned = family.plan(schedule, family.policy("fastvar", schedule, model.depth), model)
        found.append(
            {
                "size": f"{width}x{height}",
                "width": width,
                "height": height,
                "shape": round(_shape(schedule), 3),
                "bucket": schedule.bucket,
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
    height, width = schedule.rope_grid
    return float(width / height)


def _size_table(facts: list[dict[str, Any]], model: str) -> Table:
    table = Table(
        caption=f"forwarded: share of tokens times layers that the fastvar policy computes ({model}); "
        "zero-shot: finer than any image a model was trained on"
    )
    for heading in ("shape", "size", "bucket", "scales", "tokens", "forwarded", ""):
        table.add_column(heading, justify="right" if heading else "left")
    shape = None
    for entry in facts:
        if entry["shape"] != shape:
            table.add_section()
        first = f"{entry['shape']:.2f}" if entry["shape"] != shape else ""
        shape = entry["shape"]
        note = "zero-shot" if entry["zero_shot"] else ""
        share = f"{entry['forwarded_share']:.0%}"
        table.add_row(first, entry["size"], entry["bucket"], str(entry["scales"]), str(entry["tokens"]), share, note)
    return table
