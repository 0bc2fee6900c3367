"""Searches pruning policies for the demo: captions that were never trained on, accuracy read back from the pixels.

`python -m demo.measuring.tune` writes benchmarks/results/demo-tune.json, docs/tune.svg, and policy files to
demo/out/tune.
"""

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from demo.bundles import OUT, ROOT, ensure_bundles, exit_on_user_error
from demo.measuring.score import caption_accuracy
from demo.measuring.speed import RESULTS
from demo.sheet import held_out_captions
from fastvar.engines.bundle.bundle import Bundle
from fastvar.profiling.tuning.rebuilder import Rebuilder
from fastvar.profiling.tuning.report import best_line, front_table, write_all
from fastvar.profiling.tuning.search import Constraints
from fastvar.profiling.tuning.trials import TuningSetup, tune_bundle

CAPTIONS = 48
MIN_ACCURACY = 0.98  # of the dense one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=CAPTIONS, help="number of held-out captions")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes, and of the first image")
    parser.add_argument("--runs", type=int, default=15, help="timed images of each policy, after one warm-up")
    parser.add_argument("--minutes", type=float, default=30, help="wall clock to spend")
    parser.add_argument("--min-accuracy", type=float, default=MIN_ACCURACY, help="share of the dense accuracy")
    parser.add_argument("--out", type=Path, default=OUT / "tune", help="folder of the policy files")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    parser.add_argument("--json", type=Path, default=RESULTS / "demo-tune.json", help="where the figures go")
    parser.add_argument("--plot", type=Path, default=ROOT.parent / "docs" / "tune.svg", help="where the plot goes")
    arguments = parser.parse_args()
    captions = held_out_captions(max(arguments.count, 0), arguments.seed)
    setup = TuningSetup(tuple(captions), arguments.count, arguments.seed, arguments.runs)
    constraints = Constraints(min_accuracy_share=arguments.min_accuracy)
    source = ensure_bundles()["fastvar"]
    bundle = Bundle.open(source)
    with (
        tempfile.TemporaryDirectory(dir=OUT, prefix=".tune-") as folder,
        Rebuilder(source, Path(folder)) as rebuilder,
        Console(stderr=True).status("starting") as status,
    ):
        tuning = tune_bundle(
            bundle.manifest,
            rebuilder.build,
            setup,
            constraints,
            scorer=caption_accuracy,
            minutes=arguments.minutes,
            threads=arguments.threads,
            told=status.update,
        )
    written = write_all(tuning, bundle, setup, arguments.out, data=arguments.json, plot=arguments.plot)
    Console().print(front_table(tuning))
    print(best_line(tuning))
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    exit_on_user_error(main)
