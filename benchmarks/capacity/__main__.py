"""`python -m benchmarks.capacity`: replicas for a load and a p99, by simulation with measured times of passes.

Times come from a JSON of an earlier run (--times), or from a bundle here and now (--bundle), whose passes are drawn in
turn. Writes JSON, and the tables of docs/scale-out.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.capacity.growth import HEAD as HEAD_OF_GROWTH
from benchmarks.capacity.growth import Measured, rows
from benchmarks.capacity.planning import Choice, fewest, tried
from benchmarks.capacity.simulation import Service, Setting
from benchmarks.serving.recorded import PROMPT, RESULTS, today
from benchmarks.tables import markdown_table, placed_in
from fastvar import Pipeline
from fastvar.errors import FastvarError, InputError
from fastvar.profiling.environment import environment

SHARES = (0.5, 0.8, 0.9)  # of the most that replicas can draw
REPLICAS = (1, 10, 100, 1000)
BEGIN, END = "<!-- capacity: made by `python -m benchmarks.capacity` -->", "<!-- capacity: end -->"
BEGIN_GROWTH, END_GROWTH = "<!-- growth: made by `python -m benchmarks.capacity` -->", "<!-- growth: end -->"
HEAD = ("requests a second", "replicas", "p50", "p99", "refused", "busy", "images a pass")
RATES = (1.0, 10.0, 100.0, 1000.0)


def measured(bundle: Path, rounds: int) -> dict[str, Any]:
    """Seconds of passes of every size that the bundle has, with the images' encoding, each size in turn."""
    with Pipeline.load(bundle) as pipe:
        sizes = pipe.batch_sizes["on"]
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for turn in range(rounds + 1):  # the first is not counted
            for size in sizes:
                begun = time.monotonic()
                pipe([PROMPT] * size, seed=turn)
                if turn:
                    seconds[size].append(time.monotonic() - begun)
        return {"seconds": seconds, "environment": environment(pipe.manifest), "bundle": pipe.bundle.digest}


def read_times(file: Path) -> dict[str, Any]:
    """What an earlier run measured.

    Raises:
        InputError: it holds no times.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))["measured"]
    except (OSError, ValueError, KeyError) as error:
        fix = "measure some: --bundle BUNDLE"
        raise InputError(f"{file} holds no times of passes", expected="what --bundle has written", fix=fix) from error
    return {**found, "seconds": {int(size): times for size, times in found["seconds"].items()}}


def described(choice: Choice, rate: float) -> dict[str, Any]:
    """Ready for json.dumps."""
    outcome = choice.outcome
    return {
        "rate": rate,
        "replicas": choice.replicas,
        "p50_s": outcome.quantile(0.5),
        "p99_s": outcome.quantile(0.99),
        "refused_share": outcome.refused_share,
        "busy_share": outcome.busy_s / outcome.lasted_s / choice.replicas,
        "images_a_pass": outcome.images / outcome.passes,
    }


def planned(service: Service, p99_s: float, queue: int) -> dict[str, Any]:
    def under(rate: float, replicas: int = 1) -> Setting:
        return Setting(rate, replicas, service, queue)

    chosen = []
    for rate in RATES:
        choice = fewest(under(rate), p99_s)
        chosen.append({"rate": rate, "replicas": None} if choice is None else described(choice, rate))
    grown = []
    for replicas in REPLICAS:
        for share in SHARES:
            rate = share * replicas * service.images_per_s
            grown.append({"share": share, **described(tried(under(rate), replicas), rate)})
    return {"p99_target_s": p99_s, "queue": queue, "chosen": chosen, "grown": grown}


def table(record: dict[str, Any]) -> str:
    """Both tables, in Markdown."""
    none = ["none suffice", *[""] * (len(HEAD) - 2)]
    chosen = [[f"{one['rate']:,.0f}", *(_shown(one) if one["replicas"] else none)] for one in record["chosen"]]
    grown = [[f"{one['rate']:,.1f} ({one['share']:.0%})", *_shown(one)] for one in record["grown"]]
    return "\n\n".join(
        (
            _surroundings(record["measured"]),
            f"Replicas for a p99 of {record['p99_target_s']:g} s:",
            markdown_table(HEAD, chosen),
            "What so many replicas give, at shares of the most that they can draw:",
            markdown_table(HEAD, grown),
        )
    )


def _shown(one: dict[str, Any]) -> list[str]:
    return [
        f"{one['replicas']:,}",
        f"{one['p50_s']:.2f} s",
        f"{one['p99_s']:.2f} s",
        f"{one['refused_share']:.2%}",
        f"{one['busy_share']:.0%}",
        f"{one['images_a_pass']:.2f}",
    ]


def growth_table(record: dict[str, Any], front: dict[str, Any]) -> str:
    """Replicas, and what they ask of the rest."""
    found = markdown_table(HEAD_OF_GROWTH, rows(Measured.of(record["images_per_s"], front), REPLICAS))
    return f"{_surroundings(front)}\n\n{found}"


def _surroundings(measured: dict[str, Any]) -> str:
    """Where its times come from, and how busy that was: other work makes everything slower than it is."""
    where = measured["environment"]
    load = f"a load of {measured['load_before']:.1f} before"
    return f"Measured on {measured['date']}, {where['cpu_cores']} cores of an {where['cpu']}, {load}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="measure its passes")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--times", type=Path, default=RESULTS / "capacity.json", help="JSON of an earlier run")
    parser.add_argument("--p99", type=float, help="seconds; four passes of the largest size by default")
    parser.add_argument("--queue", type=int, default=16, help="requests of a replica that may wait")
    parser.add_argument("--out", type=Path, default=RESULTS / "capacity.json")
    parser.add_argument("--front", type=Path, default=RESULTS / "front.json", help="JSON of benchmarks.serving.front")
    parser.add_argument("--docs", type=Path, help="write the tables there")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    try:
        times = read_times(given.times) if given.bundle is None else measured(given.bundle, given.rounds)
    except FastvarError as error:
        sys.exit(f"error: {error}")
    if given.bundle is not None:
        times |= {"load_before": load, "date": today()}
    service = Service(times["seconds"])
    p99_s = given.p99 or round(4 * fmean(service.seconds[service.sizes[-1]]), 1)
    passes = {size: median(seconds) for size, seconds in service.seconds.items()}
    record = {"measured": times, "median_pass_s": passes, "images_per_s": service.images_per_s}
    record |= planned(service, p99_s, given.queue)
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    if given.docs is not None:
        page = placed_in(given.docs.read_text(encoding="utf-8"), table(record), BEGIN, END)
        if given.front.exists():
            growth = growth_table(record, json.loads(given.front.read_text(encoding="utf-8")))
            page = placed_in(page, growth, BEGIN_GROWTH, END_GROWTH)
        given.docs.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
