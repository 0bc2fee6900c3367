"""Times the demo dense against pruned: alternating runs, the first pair thrown away, medians and their ratio.

`python -m demo.measuring.speed` writes benchmarks/results/; the wall clock covers text encoder, all scales and decoder.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from demo.bundles import OUT, ROOT, SIZE, ensure_bundles, exit_on_user_error
from fastvar import Pipeline
from fastvar.profiling.environment import environment
from fastvar.runtime.output import ImageTimings

RESULTS = ROOT.parent / "benchmarks" / "results"
PROMPTS = (
    "a large red circle in the centre on a white background",
    "a small striped blue square above a large checked yellow triangle on a black background",
    "a green circle left of a checked purple square left of a striped cyan triangle on a gray background",
)
Runs = dict[str, list[ImageTimings]]  # policy -> one entry a run


def measure(pipes: Mapping[str, Pipeline], prompts: Sequence[str], runs: int) -> Runs:
    """Draw one image a run with every pipeline in turn. Run -1 warms up and is excluded by construction."""
    timings: Runs = {policy: [] for policy in pipes}
    for run in range(-1, runs):
        for policy, pipe in pipes.items():
            timing = pipe(prompts[run % len(prompts)], seed=run + 1).timings[0]
            if run >= 0:
                timings[policy].append(timing)
    return timings


def summarize(runs: Runs) -> dict[str, Any]:
    """Medians in milliseconds per policy, and how many times faster the second policy is than the first."""
    medians: dict[str, dict[str, Any]] = {
        policy: {
            "text_ms": median(t.text_ms for t in timings),
            "scales_ms": median(t.scales_ms for t in timings),
            "decode_ms": median(t.decode_ms for t in timings),
            "total_ms": median(t.total_ms for t in timings),
            "scales": _scale_medians(timings),
        }
        for policy, timings in runs.items()
    }
    first, second = medians.values()
    return {
        "runs": len(next(iter(runs.values()))),
        "policies": medians,
        "speedup_scales": first["scales_ms"] / second["scales_ms"],
        "speedup_total": first["total_ms"] / second["total_ms"],
    }


def _scale_medians(timings: Sequence[ImageTimings]) -> list[dict[str, Any]]:
    return [
        {
            "index": scales[0].index,
            "size": list(scales[0].size),
            "tokens": scales[0].tokens,
            "kept": scales[0].kept,
            "ms": median(scale.ms for scale in scales),
        }
        for scales in zip(*(timing.scales for timing in timings), strict=True)
    ]


def scale_table(summary: Mapping[str, Any]) -> Table:
    """Per scale: tokens, kept tokens and milliseconds of both policies; a scale that one leaves out stays blank."""
    by_policy = {
        policy: {scale["index"]: scale for scale in found["scales"]} for policy, found in summary["policies"].items()
    }
    (first, dense), (second, pruned) = by_policy.items()
    table = Table(title=f"medians of {summary['runs']} runs, ms")
    for heading in ("scale", "size", "tokens", "kept", first, second, "ratio"):
        table.add_column(heading, justify="right")
    for index, scale in dense.items():
        height, width = scale["size"]
        row = (str(index), f"{width}x{height}", str(scale["tokens"]))
        other = pruned.get(index)
        table.add_row(*row, *(_scale_cells(scale, other) if other else ("skipped", f"{scale['ms']:.1f}", "", "")))
    table.add_section()
    rows = {"text": "text_ms", "all scales": "scales_ms", "decoder": "decode_ms", "image": "total_ms"}
    for label, key in rows.items():
        a, b = (found[key] for found in summary["policies"].values())
        table.add_row(label, "", "", "", f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}")
    return table


def _scale_cells(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> tuple[str, ...]:
    return str(pruned["kept"]), f"{dense['ms']:.1f}", f"{pruned['ms']:.1f}", f"{dense['ms'] / pruned['ms']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each policy, after one warm-up")
    parser.add_argument("--bundles", type=Path, default=OUT, help="folder of the two bundles; built where missing")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    parser.add_argument("--json", type=Path, default=RESULTS / f"demo-{SIZE}-cpu.json", help="where the figures go")
    arguments = parser.parse_args()
    paths = ensure_bundles(arguments.bundles)
    pipes = {policy: Pipeline.load(path, threads=arguments.threads) for policy, path in paths.items()}
    summary = summarize(measure(pipes, PROMPTS, arguments.runs))
    sampling = vars(next(iter(pipes.values())).manifest.sampling)
    record = {
        "what": f"one {SIZE} image of the demo model, batch 1, text encoder and decoder included in total_ms",
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(next(iter(pipes.values())).manifest),
        "threads": arguments.threads,
        "sampling": sampling,
        **summary,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    Console().print(scale_table(summary))
    print(f"wrote {arguments.json}")


if __name__ == "__main__":
    exit_on_user_error(main)
