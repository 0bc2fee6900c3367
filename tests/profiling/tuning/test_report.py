from io import StringIO
from math import inf
from pathlib import Path

import pytest
from rich.console import Console

from fastvar.core.policy import DENSE
from fastvar.errors import InputError
from fastvar.families.infinity import INFINITY
from fastvar.families.infinity_presets import schedule_for
from fastvar.profiling.tuning.report import best_line, front_plot, front_table, write_policies
from fastvar.profiling.tuning.search import Constraints, Quality, Timing, Trial, Tuning
from fastvar.profiling.tuning.space import PolicySpace

SPACE = PolicySpace(schedule_for((256, 256)), 8, (3, 8))
FAST, FASTER, WORSE = SPACE.policy({6: 0.5}), SPACE.policy({}, skipped=1), SPACE.policy({5: 0.5, 6: 0.5})


def tuning(constraints: Constraints | None = None) -> Tuning:
    dense = Trial(DENSE, 1.0, Quality(inf, 1.0, 0.9), Timing(100, 100, 9))
    fast = Trial(FAST, 0.8, Quality(30.0, 0.97, 0.88), Timing(80, 100, 9))
    faster = Trial(FASTER, 0.5, Quality(25.0, 0.94, 0.7), Timing(50, 100, 9))
    worse = Trial(WORSE, 0.7, Quality(29.0, 0.96, 0.87), Timing(90, 100, 9))
    return Tuning((dense, fast, faster, worse), FAST, constraints or Constraints())


def test_the_best_in_one_line():
    line = best_line(tuning(Constraints(min_accuracy_share=0.95)))
    assert line.startswith("best: 6k50-c5-l3, 1.25 times as fast as dense, PSNR 30.0 dB, SSIM 0.970, accuracy 0.880")
    assert best_line(tuning(Constraints(min_psnr_db=31))) == "best: dense; no faster policy meets the constraints"


def test_the_table_shows_the_front_from_the_fastest_on():
    console = Console(width=100, record=True, file=StringIO())
    console.print(front_table(tuning()))
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line]
    assert [row[:2] for row in rows] == [["6x", "2.00"], ["6k50-c5-l3", "1.25"], ["dense", "1.00"]]


def test_policy_files_are_the_policies(tmp_path: Path):
    written = write_policies(tuning(), tmp_path)
    assert [path.name for path in written] == ["6x.toml", "6k50-c5-l3.toml", "dense.toml", "best.toml"]
    for path, policy in zip(written, (FASTER, FAST, DENSE), strict=False):
        read = INFINITY.policy(str(path), SPACE.schedule, 8)
        assert (read.name, SPACE.key(read)) == (policy.name, SPACE.key(policy))
    assert SPACE.key(INFINITY.policy(str(written[-1]), SPACE.schedule, 8)) == SPACE.key(FASTER)


def test_the_plot_names_the_best_and_the_reference():
    drawn = front_plot(tuning(), "title")
    assert ">6x</text>" in drawn
    assert ">6k50-c5-l3</text>" in drawn
    assert ">5k50-6k50-c4-l3</text>" not in drawn
    assert drawn.count("<circle") == 3, "equal images have no PSNR"


def test_nothing_to_plot():
    only = Tuning(tuning().trials[:1], FAST)
    with pytest.raises(InputError, match="every policy drew the dense images"):
        front_plot(only, "title")
