"""All campaigns: `make torture`. Writes JSON; exits with 1 where anything was lost, broken or crashed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import fastvar
from tests.soak import soak
from tests.torture.children import run_child
from tests.torture.coverage_guided import RUNS, coverage_campaign
from tests.torture.full_disk import STEP_BYTES, can_mount, fill_disks
from tests.torture.fuzzing import Kind, bundles, campaign, checkpoints, pictures, policies, prompt_files
from tests.torture.kills import expect, kill_batches, kill_builds, kill_rebuilds
from tests.torture.models import Workshop

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "torture.json"
KILLS, IMAGES = 100, 1000
MOST_GROWTH = 0.01
Campaigns = dict[str, Callable[[], dict[str, Any]]]


def fuzz_kinds(shop: Workshop) -> dict[Kind, int]:
    """Kinds of files, and how many of each are damaged: 10,000 together."""
    return {
        bundles(shop, "kept"): 1000,
        bundles(shop, "absent"): 1000,
        bundles(shop, "fitting"): 2000,
        checkpoints(shop, "safetensors"): 1000,
        checkpoints(shop, "pickle"): 1000,
        policies(shop): 1500,
        prompt_files(shop): 1000,
        pictures(): 1500,
    }


def drop_streams(shop: Workshop, images: int, seed: int) -> dict[str, Any]:
    """Images from 8 threads, streams dropped at random: bit-identical per seed, and memory does not grow."""
    bundle = shop.empty("soaked") / "bundle"
    expect(run_child(lambda: shop.build(bundle)), "done")
    found = expect(run_child(lambda: soak(bundle, images, 8, seed), timeout=3600), "done").value
    memory = found.pop("rss_mib")
    # What the process takes once every kind of work was done, against the end: medians, for single readings jump.
    settled, last = (statistics.median(memory[a:b]) for a, b in ((len(memory) // 5, len(memory) // 3), (-50, None)))
    grown = last / settled - 1
    bad = len(found["differing"]) + len(found["errors"]) + found["alive"] + (grown > MOST_GROWTH and images >= 500)
    return {**found, "rss_mib": [round(settled, 1), round(last, 1)], "rss_growth": round(grown, 4), "bad": bad}


def coverage(seed: int, share: float) -> dict[str, Any]:
    """Coverage-guided fuzzing, where atheris is installed."""
    if importlib.util.find_spec("atheris") is None:
        return {"skipped": "atheris is not installed", "bad": 0}
    return coverage_campaign(seed, max(100, round(RUNS * share)))


def campaigns(shop: Workshop, seed: int, share: float) -> Campaigns:
    """Everything that is run, by name; `share` of the full number of trials."""

    def some(trials: int) -> int:
        return max(1, round(trials * share))

    found: Campaigns = {
        "kill -9 in a build": lambda: kill_builds(shop, some(KILLS), random.Random(seed)),
        "kill -9 in a rebuild": lambda: kill_rebuilds(shop, some(KILLS), random.Random(seed)),
        "kill -9 in a batch": lambda: kill_batches(shop, some(KILLS), random.Random(seed)),
    }
    for kind, trials in fuzz_kinds(shop).items():
        found[f"damaged {kind.name}"] = lambda k=kind, n=trials: campaign(k, some(n), seed, shop.folder)
    found["coverage-guided"] = lambda: coverage(seed, share)
    found["streams dropped"] = lambda: drop_streams(shop, some(IMAGES), seed)
    if can_mount(shop.folder):
        found["full disk"] = lambda: fill_disks(shop, round(STEP_BYTES / share))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="share of the full number of trials, 0.05 say")
    parser.add_argument("--only", help="campaigns whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/torture.json for all campaigns in full")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder))
        expect(run_child(lambda: shop.build(shop.empty("warm-up") / "bundle", jobs=2)), "done")  # fills the cache
        for name, run in campaigns(shop, arguments.seed, arguments.share).items():
            if arguments.only and arguments.only not in name:
                continue
            start = time.perf_counter()
            results[name] = run()
            bad = bad_of(results[name])
            print(f"{name}: {'bad: ' + str(bad) if bad else 'good'}, {time.perf_counter() - start:.0f} s", flush=True)
    bad = sum(bad_of(result) for result in results.values())
    record = {
        "fastvar": fastvar.__version__,
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "seed": arguments.seed,
        "share": arguments.share,
        "bad": bad,
        "campaigns": results,
    }
    whole = arguments.share == 1 and not arguments.only
    out = arguments.out or (RESULTS if whole else None)
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {out}")
    elif bad:
        print(json.dumps(results, indent=1))
    return int(bad > 0)


def bad_of(result: dict[str, Any]) -> int:
    """Faults of a campaign, or of those that it is made of."""
    own = result.get("bad")
    return own if own is not None else sum(bad_of(part) for part in result.values())


if __name__ == "__main__":
    sys.exit(main())
