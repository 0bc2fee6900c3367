"""Contenders in turn, ratios by round, and that nobody is timed who draws something else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import contenders
from benchmarks import timing as contest
from benchmarks.contenders import EngineContender, Entry, default_contenders, parse_contenders
from benchmarks.eager import EagerContender, EagerModel
from benchmarks.timing import (
    LEAST_ROUNDS,
    Agreement,
    Pace,
    Ratio,
    come_to_rest,
    compare,
    drawn_bits,
    forced_logits,
    paired,
    require_agreement,
    timed_in_turn,
)
from fastvar.core.plan import make_plan
from fastvar.core.policy import DENSE
from fastvar.engines.aotinductor import targets as cpu_targets
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import InputError, NumericsError
from fastvar.export.models.infinity.reference import Sampling
from fastvar.runtime.requests.settings import SamplingSettings

SETTINGS = SamplingSettings(3.0, 1.0, 0.97)
IDS = np.array([[5, 6, 7, 1]], np.int64)


class Stopwatch:
    """A contender whose scales take 1 ms each, 1000 in its first image; may fail in a round."""

    def __init__(self, name: str, log: list[str], fails_at: int | None = None) -> None:
        self.name, self.log, self.fails_at = name, log, fails_at
        self.images = self.decoded = 0

    def text(self) -> float:
        return 2.0

    def scales(self, noise: Callable[[int, tuple[int, ...]], np.ndarray]) -> list[float]:
        self.log.append(f"{self.name} {float(noise(0, (1,))[0]):.6f}")
        self.images += 1
        if self.images - 2 == self.fails_at:
            raise RuntimeError("out of memory")
        return [1000.0] if self.images == 1 else [1.0, 1.0]

    def decode(self) -> float:
        self.decoded += 1
        return 5.0


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting is tested by itself."""
    monkeypatch.setattr(contest, "come_to_rest", lambda: None)


def test_contenders_alternate_with_equal_noise_and_the_first_round_does_not_count():
    log: list[str] = []
    pair = {name: Stopwatch(name, log) for name in ("a", "b")}
    found = timed_in_turn(pair, {"a": 3, "b": 2}, decode_runs=1)
    assert [line.split()[0] for line in log] == ["a", "b"] * 3 + ["a"]
    for round_ in (log[0:2], log[2:4], log[4:6]):
        assert round_[0].split()[1] == round_[1].split()[1]
    assert len({line.split()[1] for line in log}) == 3, "the warm-up draws round 1's image"
    assert [run.scales_ms for run in found["a"]] == [2.0] * 3
    assert [run.decode_ms for run in found["a"]] == [5.0, None, None]
    assert pair["a"].decoded == 2, "the warm-up decodes too"
    assert len(found["b"]) == 2


def test_who_has_run_before_does_not_warm_up():
    log: list[str] = []
    pair = {name: Stopwatch(name, log) for name in ("a", "b")}
    found = timed_in_turn(pair, 2, pace=Pace(cold=("b",)))
    assert [line.split()[0] for line in log] == ["b", "a", "b", "a", "b"]
    assert [run.scales_ms for run in found["a"]] == [1000.0, 2.0]


def test_a_long_warm_up_is_the_first_round():
    log: list[str] = []
    found = timed_in_turn({"a": Stopwatch("a", log), "b": Stopwatch("b", log)}, {"a": 1, "b": 2}, pace=Pace(long_s=0.5))
    assert [run.scales_ms for run in found["a"]] == [1000.0]
    assert [run.scales_ms for run in found["b"]] == [1000.0, 2.0]
    assert [line.split()[0] for line in log] == ["a", "b", "b"]


def test_rounds_end_when_they_have_taken_long():
    assert len(timed_in_turn({"a": Stopwatch("a", [])}, 9, pace=Pace(most_s=0.0))["a"]) == LEAST_ROUNDS
    assert len(timed_in_turn({"a": Stopwatch("a", [])}, 2, pace=Pace(most_s=0.0))["a"]) == 2


def test_a_run_tells_the_time_of_all_threads():
    class Busy(Stopwatch):
        def scales(self, noise):
            begun = time.process_time()
            while time.process_time() - begun < 0.05:
                pass
            return [1.0]

    (run,) = timed_in_turn({"a": Busy("a", [])}, 1)["a"]
    assert run.cpu_ms is not None
    assert 50 <= run.cpu_ms < 5000


@pytest.mark.parametrize(("ms", "runs"), [(5.0, 3), (4000.0, 2), (60_000.0, 1)])
def test_the_decoder_is_run_again_unless_it_takes_long(ms: float, runs: int):
    class Decoder(Stopwatch):
        def decode(self) -> float:
            return ms

    assert contest.decoder_ms(Decoder("a", []), 3) == [ms] * runs


def test_who_fails_leaves_and_the_others_go_on():
    told: list[tuple[str, str]] = []
    pair = {"a": Stopwatch("a", []), "b": Stopwatch("b", [], fails_at=1)}
    found = timed_in_turn(pair, 3, on_failure=lambda name, error: told.append((name, str(error))))
    assert list(found) == ["a"]
    assert len(found["a"]) == 3
    assert told == [("b", "out of memory")]
    with pytest.raises(RuntimeError, match="out of memory"):
        timed_in_turn({"b": Stopwatch("b", [], fails_at=0)}, 1)


def test_ratios_are_paired_by_round():
    assert paired([10, 20, 30], [5, 5, 5]) == Ratio(4.0, 2.0, 6.0, 3)
    assert paired([10, 20], [5, 10, 1]) == Ratio(2.0, 2.0, 2.0, 2), "rounds that both took part in"
    assert paired([], [1.0]) is None


def test_a_spinning_process_is_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    spun = iter([0.0, 0.02, 0.02, 0.04, 0.04, 0.04])  # two looks full of work, then none
    monkeypatch.setattr(time, "process_time", lambda: next(spun))
    come_to_rest()
    assert next(spun, None) is None
    monkeypatch.setattr(contest, "LONGEST_REST_S", 0.03)
    monkeypatch.setattr(time, "process_time", time.perf_counter)
    with caplog.at_level(logging.WARNING):
        come_to_rest()
    assert "still spin" in caplog.text


# Agreement


def test_median_token_counts_and_all_bits():
    """One swapped token among many is rounding's doing; half of them are not."""
    expected = [np.random.default_rng(i).normal(size=(9, 8)).astype(np.float32) for i in range(2)]
    swapped = [expected[0], expected[1].copy()]
    swapped[1][4] *= -1
    found = compare(swapped, expected, (0, 3), top_p=0.97)
    assert (found.error, found.worst_error) == (0.0, 0.0)
    assert 0.9 < found.equal_bits < 1
    halved = compare([-expected[0], expected[1]], expected, (0, 3), top_p=0.97)
    assert (halved.error, halved.worst_error) == (0.0, pytest.approx(2.0))


def test_bits_of_certain_logits_are_certain():
    logits = np.array([[0, 9, 9, 0], [9, 0, 0, 9]], np.float32)
    assert drawn_bits(logits, 0, top_p=0.9).tolist() == [[True, False], [False, True]]
    assert drawn_bits(logits, 0, top_p=0.0).tolist() == drawn_bits(logits, 0, top_p=1.0).tolist()


@pytest.mark.parametrize(
    ("precision", "agreement", "fine"),
    [
        ("fp32", Agreement(1e-5, 1e-5, 1.0), True),
        ("fp32", Agreement(1e-5, 2e-3, 1.0), False),
        ("fp32", Agreement(1e-5, 1e-5, 0.98), False),
        ("fp32", Agreement(float("nan"), 1e-5, 1.0), False),
        ("bf16", Agreement(0.01, 0.02, 0.99), True),
        ("bf16", Agreement(0.5, 0.5, 0.99), False),
    ],
)
def test_who_disagrees_is_refused(precision: str, agreement: Agreement, fine: bool):
    if fine:
        require_agreement("ours", precision, agreement, SETTINGS)
    else:
        with pytest.raises(NumericsError, match="ours computes something else"):
            require_agreement("ours", precision, agreement, SETTINGS)


def test_engines_agree_with_eager_torch_from_the_prompt_on(tiny_bundle: Path, tiny_checkpoint):
    """Text encoder, condition and every scale; another plan or other weights are seen."""
    bundle = Bundle.open(tiny_bundle)
    plan = bundle.manifest.plan
    scales = [step.index for step in plan.steps]
    engines = EngineContender(bundle, IDS, SETTINGS)
    eager = EagerModel(tiny_checkpoint, "fp32")
    baseline = EagerContender(eager, plan, IDS, Sampling())
    found, expected = forced_logits(engines), forced_logits(baseline)
    agreement = compare(found, expected, scales, SETTINGS.top_p)
    assert agreement.worst_error < 1e-4
    assert agreement.equal_bits == 1
    require_agreement("onnxruntime:fp32", "fp32", agreement, SETTINGS)
    dense_plan = make_plan(plan.schedule, DENSE, plan.depth)
    other = EagerContender(eager, dense_plan, IDS, Sampling())
    last = [forced_logits(other)[-1]]
    with pytest.raises(NumericsError):
        require_agreement("dense", "fp32", compare(last, expected[-1:], scales[-1:], 0.97), SETTINGS)
    text_ms, ms = engines.text(), engines.scales(contest.noise_of(1))
    assert text_ms > 0
    assert len(ms) == len(plan.steps)
    assert engines.decode() > 0


# Who takes part


def test_contenders_by_name():
    found = parse_contenders("eager-dense:bf16, onnxruntime:fp32,onnxruntime:fp32:dense", policy="other.toml")
    assert found == {
        "eager-dense:bf16": Entry("eager-dense", "bf16", "dense"),
        "onnxruntime:fp32": Entry("onnxruntime", "fp32", "other.toml"),
        "onnxruntime:fp32:dense": Entry("onnxruntime", "fp32", "dense"),
    }
    assert parse_contenders("eager-pruned:fp32", policy="other.toml")["eager-pruned:fp32"].policy == "fastvar"
    assert [entry.dense_eager for entry in found.values()] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no contender"),
        ("onnxruntime", "not understood"),
        ("onnx:fp32", "'onnx:fp32' not understood"),
        ("eager:fp32", "not understood"),
        ("onnxruntime:fp64", "not understood"),
        ("onnxruntime:bf16", "does not compute in bf16"),
        ("eager-dense:fp32,eager-dense:fp32", "named twice"),
    ],
)
def test_contenders_that_are_refused(text: str, problem: str):
    with pytest.raises(InputError, match=problem):
        parse_contenders(text)


def test_by_default_those_that_are_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(contenders.DEFAULTS, "cpu", "eager-dense:bf16,onnxruntime:fp32,nowhere:bf16")
    names, missing = default_contenders("cpu")
    assert names == "eager-dense:bf16,onnxruntime:fp32"
    assert missing == {"nowhere:bf16": "no backend 'nowhere'"}


def test_the_standard_table_has_both_precisions_of_eager_torch_and_all_of_ours(monkeypatch: pytest.MonkeyPatch):
    entries = parse_contenders(contenders.DEFAULTS["cpu"])
    eager = {(entry.engine, entry.precision) for entry in entries.values() if entry.eager}
    assert eager == {(engine, precision) for engine in contenders.EAGER for precision in ("fp32", "bf16")}
    ours = {name for name, entry in entries.items() if not entry.eager}
    assert ours == {"onnxruntime:fp32", "aotinductor:fp32", "aotinductor:bf16", "aotinductor:w8a8"}
    monkeypatch.setattr(cpu_targets, "_offered", lambda torch: ("cpu-avx2",))
    names, missing = default_contenders("cpu")
    assert set(missing) == {"aotinductor:w8a8"}
    assert "no instructions for --weights w8a8" in missing["aotinductor:w8a8"]
    assert "aotinductor:bf16" in names
