"""What `fastvar plan` shows: the timeline, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..core.dtypes import human_bytes
from ..core.platform import memory_bytes
from ..profiling.estimates.fitting import Fit
from ..profiling.estimates.memory_plan import MemoryPlan, Part, TimelineEntry
from ..profiling.estimates.passes import PassLaunches
from ..profiling.estimates.requests import PlanRequest
from ..profiling.report.columns import Column, text_table

HEADINGS = {  # short, for a terminal of 80 columns
    Part.WEIGHTS: "weight",
    Part.TEXT_ENCODER: "encoder",
    Part.KEYS: "keys",
    Part.TEXT_KEYS: "text",
    Part.TOKEN_CACHES: "cache",
    Part.ACTIVATIONS: "activ",
    Part.WORKSPACE: "scratch",
    Part.DECODER: "decoder",
    Part.LIBRARY: "library",
}


def plan_facts(request: PlanRequest, shown: Fit, budget: int | None) -> dict[str, Any]:
    """Everything that the table shows, ready for json.dumps; sizes in bytes."""
    plan, need = shown.plan, shown.plan.need
    return {
        "what": request.title,
        "guidance_rows": plan.rows,
        "images": plan.images,
        "largest_batch": None if budget is None else _largest_batch(request, shown, budget),
        "choice": vars(shown.choice),
        "chosen": shown.choice.differences(request.asked),
        "workspace_estimated": request.estimated,
        "allocated": {**vars(need), "total_bytes": need.total_bytes},
        "budget_bytes": budget,
        "machine_bytes": memory_bytes() if request.on_host else None,
        "fits": None if budget is None else need.total_bytes <= budget,
        "launches": [{**vars(own), "engines_an_image": own.engines_an_image} for own in plan.launches],
        "timeline": [
            {"what": m.what, "total_bytes": m.total, "parts": {p.value: b for p, b in m.used.items()}}
            for m in plan.moments
        ],
        "peak": plan.peak.what,
    }


def timeline_table(title: str, plan: MemoryPlan, budget: int | None) -> Table:
    """A row for each moment: memory in use, by part, in MiB. Parts that are never in use are left out."""
    parts = [part for part in Part if any(moment.used[part] for moment in plan.moments)]
    columns = [
        Column("scale", lambda m: m.what.removeprefix("scale ").replace(",", ""), justify="left"),
        *(Column(HEADINGS[part], f"used.{part.value}", _mebibytes) for part in parts),
        Column("in use", "total", _mebibytes, style="bold"),
    ]

    def style(moment: TimelineEntry) -> str | None:
        over = budget is not None and moment.total > budget
        return "red" if over else "green" if moment is plan.peak else None

    layout = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    return text_table(columns, plan.moments, style, no_wrap=True, title=f"{title}: MiB in use", **layout)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f}" if count else ""


def verdict_lines(request: PlanRequest, shown: Fit, budget: int | None) -> list[str]:
    """The memory allocated, and the choices that make it fit."""
    need, peak = shown.plan.need, shown.plan.peak
    library = f" + library {human_bytes(need.library_bytes)}" if need.library_bytes else ""
    lines = [
        f"allocated when loaded: weights {human_bytes(need.weight_bytes)} + arena {human_bytes(need.arena_bytes)}"
        f"{library} = {human_bytes(need.total_bytes)}",
        f"most in use: {human_bytes(peak.total)}, {peak.what}",
    ]
    if need.packed_bytes:
        lines.append(f"besides, where there is room: {human_bytes(need.packed_bytes)} of packed matrices, for speed")
    lines += _launch_lines(_launches(shown))
    if request.estimated:
        lines.append("workspace is estimated: nothing has been compiled yet; all else is exact")
    here = memory_bytes() if request.on_host else None
    if here is not None:
        fits = "does not fit into" if need.total_bytes > here else "fits into"
        lines.append(f"{fits} this machine's memory, {human_bytes(here)}")
    if budget is None or need.total_bytes > budget:
        return lines
    chosen = shown.choice.differences(request.asked)
    how = f"with {', '.join(chosen)}" if chosen else "as it is"
    lines.append(f"fits {human_bytes(budget)} {how}, {human_bytes(budget - need.total_bytes)} to spare")
    for command, options in (("build", shown.choice.build_options()), ("generate", shown.choice.load_options())):
        if options and chosen:
            lines.append(f"  fastvar {command} {' '.join(options)}")
    largest = _largest_batch(request, shown, budget)
    return lines if largest is None else [*lines, f"largest batch that fits so: {largest} images in one pass"]


def _launches(shown: Fit) -> list[PassLaunches]:
    """Of passes with as many guidance rows as the one that is shown."""
    return [own for own in shown.plan.launches if own.guidance_rows == shown.plan.rows]


def _launch_lines(launches: Sequence[PassLaunches]) -> list[str]:
    """Where passes of several images are planned: how many launches an image takes in each."""
    if len(launches) < 2:
        return []
    told = [f"{own.engines_an_image:,.0f} in a pass of {own.images}" for own in launches]
    graphs = [f"{own.recorded_an_image:.3g}" for own in launches]
    return [f"engine launches an image: {', '.join(told)}; graphs a GPU is given: {', '.join(graphs)}"]


def _largest_batch(request: PlanRequest, shown: Fit, budget: int) -> int | None:
    """Where passes of several images were asked for: the largest that fits with what is chosen."""
    if request.images == 1 or request.largest_batch is None:
        return None
    return request.largest_batch(shown.choice, budget)


def largest_part(plan: MemoryPlan) -> str:
    """The largest part at the peak, as a reason."""
    part, size = max(plan.peak.used.items(), key=lambda item: item[1])
    return f"{part.value} alone take {human_bytes(size)} at {plan.peak.what}"
