from itertools import count

from demo.measuring.speed import measure, scale_table, summarize
from fastvar.runtime.output import ImageTimings, Output, ScaleTiming


class FakePipeline:
    """Takes `ms` for each of its scales, and an hour for the first image."""

    def __init__(self, ms: float, log: list[str], name: str, scales: tuple[int, ...] = (0, 1)) -> None:
        self.ms, self.log, self.name, self.scales, self.calls = ms, log, name, scales, count()

    def __call__(self, prompt: str, seed: int) -> Output:
        self.log.append(self.name)
        ms = 3.6e6 if next(self.calls) == 0 else self.ms
        scales = tuple(ScaleTiming(i, (i + 1, i + 1), (i + 1) ** 2, i + 1, ms) for i in self.scales)
        return Output([], [prompt], [seed], {}, [ImageTimings(1.0, scales, 3.0)])


def test_warm_up_is_excluded_and_runs_alternate():
    log: list[str] = []
    runs = measure({"dense": FakePipeline(10, log, "a"), "fastvar": FakePipeline(4, log, "b")}, ["one", "two"], 3)
    assert log == ["a", "b"] * 4
    summary = summarize(runs)
    assert summary["runs"] == 3
    assert summary["policies"]["dense"]["scales_ms"] == 20
    assert summary["speedup_scales"] == 20 / 8
    assert summary["speedup_total"] == 24 / 12


def test_table_shows_a_scale_that_only_one_policy_runs():
    log: list[str] = []
    pipes = {"dense": FakePipeline(10, log, "a"), "fastvar": FakePipeline(4, log, "b", scales=(0,))}
    table = scale_table(summarize(measure(pipes, ["one"], 2)))
    kept = list(table.columns[3].cells)
    assert kept[:2] == ["1", "skipped"]
