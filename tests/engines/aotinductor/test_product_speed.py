"""Which element type a CPU is fastest in: by what it does, not by what it is called."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastvar.engines.aotinductor import backend as aotinductor
from fastvar.engines.aotinductor.product_speed import CLEARLY, ROUNDS, ROWS, WIDTH, fastest, product_speeds, speeds_of

FLOP = 2 * ROWS * WIDTH**2


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
    assert found == {"a": pytest.approx(FLOP / 2e9), "b": pytest.approx(FLOP / 1e9)}
    assert calls == dict.fromkeys("ab", ROUNDS + 1)


def test_coarser_numbers_must_be_clearly_faster():
    assert fastest({"float32": 100.0, "bfloat16": 100.0 * CLEARLY}) == "float32"
    assert fastest({"float32": 100.0, "bfloat16": 101.0 * CLEARLY}) == "bfloat16"
    assert fastest({"float32": 121.0, "bfloat16": 77.0, "float16": 135.0}) == "float16"
    assert fastest({"float32": 1.0}) == "float32"


def test_this_cpu_is_measured_once():
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    found = product_speeds(torch, ("float32", "bfloat16"))
    assert all(0 < speed < 1e5 for speed in found.values())
    assert torch.get_num_threads() == threads
    assert product_speeds(torch, ("float32", "bfloat16")) is found


@pytest.mark.parametrize(
    ("target", "speeds", "expected"),
    [
        ("cpu-avx512-bf16", {"float32": 121.0, "bfloat16": 77.0}, "float32"),  # an Intel Xeon without AMX
        ("cpu-avx512-bf16", {"float32": 75.0, "bfloat16": 150.0}, "bfloat16"),  # an AMD EPYC
        ("cpu-avx2", {"float32": 75.0, "bfloat16": 150.0}, "float32"),  # of another machine than this one
        ("cuda-sm90", {"float32": 75.0, "bfloat16": 1.0}, "bfloat16"),
    ],
)
def test_the_precision_of_a_build_follows(monkeypatch: pytest.MonkeyPatch, target: str, speeds, expected: str):
    pytest.importorskip("torch")
    monkeypatch.setattr(aotinductor, "product_speeds", lambda torch, types: {name: speeds[name] for name in types})
    assert aotinductor.AotInductorBackend(target=target).default_precision == expected
