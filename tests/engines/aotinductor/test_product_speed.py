"""Which element type a CPU is fastest in: by what it does, not by what it is called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastvar.core.precision import Precision
from fastvar.engines.aotinductor import backend as aotinductor
from fastvar.engines.aotinductor import product_speed
from fastvar.engines.aotinductor.product_speed import ROUNDS, ROWS, WIDTH, product_speeds, speeds_of
from fastvar.engines.cache.engine_cache import default_folder
from fastvar.engines.cache.product_speeds import FLOATS, INT8, SPEEDS, ProductSpeeds, fastest, keep_speeds, kept_speeds
from fastvar.errors import BackendError, BuildError, PlanError

FLOP = 2 * ROWS * WIDTH**2
AMD = {"float32": 99.2, "bfloat16": 190.2, "float16": 21.4, "int8": 323.5}
INTEL = {"float32": 121.0, "bfloat16": 77.0, "float16": 12.0}  # a Xeon without AMX


def test_the_fastest_round_counts():
    """Products that take 2 and 1 seconds, but for the rounds in which something else ran."""
    now, calls = 0.0, dict.fromkeys("ab", 0)

    def product(name: str, seconds: Iterator[float]):
        def run() -> None:
            nonlocal now
            calls[name] += 1
            now += next(seconds)

        return run

    first, second = iter([99.0, 7.0, 2.0, 3.0, 2.0, 5.0]), iter([99.0, 1.0, 8.0, 8.0, 8.0, 8.0])
    found = speeds_of({"a": product("a", first), "b": product("b", second)}, lambda: now)
    assert found == {"a": pytest.approx(FLOP / 2e9, abs=0.05), "b": pytest.approx(FLOP / 1e9, abs=0.05)}
    assert calls == dict.fromkeys("ab", ROUNDS + 1)


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch):
    """Nothing is measured yet in this process."""
    found = pytest.importorskip("torch")
    product_speed._measured.cache_clear()
    yield found
    product_speed._measured.cache_clear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Timings that take no time: the types of each."""
    found: list[set[str]] = []

    def speeds(products, clock=None):
        found.append(set(products))
        return {name: AMD[name] for name in products}

    monkeypatch.setattr(product_speed, "speeds_of", speeds)
    return found


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without the instructions of our kernel for int8."""

    def layer(*operands):
        raise BackendError("fastvar::linear_int8: this CPU lacks avx512_vnni")

    monkeypatch.setattr(product_speed, "register", lambda operator: layer)


def test_this_cpu_is_measured(torch):
    threads = torch.get_num_threads()
    found = product_speeds(torch, None)
    assert set(FLOATS) <= set(found.gflops) <= {*FLOATS, INT8}
    assert all(0 < speed < 1e5 for speed in found.gflops.values())
    assert found.compute == fastest(found.gflops)
    assert torch.get_num_threads() == threads


def test_it_is_measured_once_for_all_processes(torch, timed, without_kernel, tmp_path: Path):
    first = product_speeds(torch, tmp_path)
    product_speed._measured.cache_clear()  # as in another process
    assert product_speeds(torch, tmp_path) == first
    assert timed == [set(FLOATS)]
    again = product_speeds(torch, tmp_path, anew=True)
    assert len(timed) == 2
    assert kept_speeds(tmp_path, first.cpu) == again


def test_without_a_folder_it_is_measured_once_a_process(torch, timed, without_kernel, tmp_path: Path):
    product_speeds(torch, None)
    product_speeds(torch, None)
    assert len(timed) == 1
    assert not (tmp_path / SPEEDS).exists()


def test_another_torch_or_cpu_is_measured_by_itself(torch, timed, without_kernel, tmp_path: Path, monkeypatch):
    here = product_speeds(torch, tmp_path)
    for name, value in (("torch", "1.0"), ("cpu", "another")):
        others = {"torch": here.torch, "cpu": here.cpu, name: value}
        (tmp_path / name).mkdir()
        keep_speeds(
            tmp_path / name, ProductSpeeds(**others, fastvar=here.fastvar, when="", gflops=INTEL, compute="float32")
        )
        product_speed._measured.cache_clear()
        assert product_speeds(torch, tmp_path / name).gflops == here.gflops
    assert len(timed) == 3


def test_a_compiler_that_comes_later_is_used(torch, timed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without one int8 cannot be timed, and nothing is kept."""
    compiler: list[str] = []

    def layer(*operands):
        if not compiler:
            raise BuildError("torch finds no C++ compiler")

    monkeypatch.setattr(product_speed, "register", lambda operator: layer)
    assert INT8 not in product_speeds(torch, tmp_path).gflops
    assert not (tmp_path / SPEEDS).exists()
    compiler.append("g++")
    product_speed._measured.cache_clear()
    assert INT8 in product_speeds(torch, tmp_path).gflops
    assert (tmp_path / SPEEDS).exists()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch):
    """Speeds as they are told, of the target that is this CPU's."""
    pytest.importorskip("torch")

    def as_told(speeds: dict[str, float], here: str) -> None:
        monkeypatch.setattr(aotinductor, "best_cpu", lambda torch: here)
        monkeypatch.setattr(
            aotinductor,
            "product_speeds",
            lambda torch, kept, candidates, anew: ProductSpeeds(
                "a CPU", "2.13.0", "0.1.0", "", speeds, fastest(speeds, candidates)
            ),
        )

    return as_told


@pytest.mark.parametrize(
    ("target", "speeds", "expected", "reason"),
    [
        ("cpu", INTEL, "float32", "nothing was measured to be clearly faster"),
        ("cpu", AMD, "bfloat16", "measured to be clearly the fastest"),
        ("cpu-avx512-bf16", AMD, "bfloat16", "measured to be clearly the fastest"),
        ("cpu", {"float32": 75.0, "bfloat16": 80.0, "float16": 900.0}, "float32", "nothing was measured"),
        ("cpu-avx2", AMD, "float32", "cpu-avx2 has no products of 16 bits"),  # of other machines than this one
        ("cuda-sm90", AMD, "bfloat16", "what GPUs multiply fast"),
    ],
)
def test_the_precision_of_a_build_follows(measured, target: str, speeds, expected: str, reason: str):
    measured(speeds, "cpu-avx512-bf16")
    precision, choice = aotinductor.AotInductorBackend(target=target).precision("auto", None)
    assert precision == Precision(expected)
    assert not choice.asked
    assert reason in choice.reason
    assert choice.gflops == (speeds if target in ("cpu", "cpu-avx512-bf16") else {})


def test_fp16_where_the_cpu_has_its_products(measured):
    """Where bf16 is as fast, that: its range is that of fp32."""
    measured({"float32": 75.0, "bfloat16": 80.0, "float16": 140.0}, "cpu-amx")
    assert aotinductor.AotInductorBackend().precision(None, None)[0] == Precision("float16")
    measured({"float32": 75.0, "bfloat16": 900.0, "float16": 950.0}, "cpu-amx")
    assert aotinductor.AotInductorBackend().precision(None, None)[0] == Precision("bfloat16")


def test_a_cpu_without_short_products_is_measured_all_the_same(measured):
    measured(AMD, "cpu-avx512")
    precision, choice = aotinductor.AotInductorBackend().precision("auto", None)
    assert precision == Precision("float32")
    assert choice.gflops == AMD
    assert choice.told == (
        "auto: cpu-avx512 has no products of 16 bits; fp32 99, bf16 190, fp16 21, int8 324 GFLOP/s a thread "
        "on a CPU with torch 2.13.0"
    )


def test_what_is_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(aotinductor, "product_speeds", lambda *_, **__: pytest.fail("measured"))
    backend = aotinductor.AotInductorBackend()
    precision, choice = backend.precision("fp16", "int8")
    assert (precision, choice.asked, choice.told) == (Precision("float16", "int8"), True, "asked for")
    precision, choice = backend.precision("auto", "w8a8")
    assert (precision, choice.asked) == (Precision("bfloat16", "int8", "int8"), False)
    assert choice.told == "auto: w8a8 goes with it"
    with pytest.raises(PlanError, match="no weight format"):
        backend.precision("auto", "int4")


def test_a_plan_knows_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without torch; before anything was measured, bf16."""
    monkeypatch.setenv("FASTVAR_CACHE", str(tmp_path))
    monkeypatch.setattr(aotinductor, "cpu_identity", lambda: "here")
    backend = aotinductor.AotInductorBackend
    assert backend.planned_precision("auto", None, None) == Precision("bfloat16")
    from fastvar.core.version import __version__

    keep_speeds(default_folder(), ProductSpeeds("here", "2.13.0", __version__, "", INTEL, "float32"))
    assert backend.planned_precision("auto", None, None) == Precision("float32")
    assert backend.planned_precision(None, "int8", "cpu") == Precision("float32", "int8")
    assert backend.planned_precision("bf16", None, None) == Precision("bfloat16")
    assert backend.planned_precision("auto", "w8a8", None) == Precision("bfloat16", "int8", "int8")
    assert backend.planned_precision("auto", None, "cuda-sm90") == Precision("bfloat16")
