from types import SimpleNamespace
from typing import Any

import pytest

from fastvar.engines.aotinductor.targets import (
    accurate_types,
    best_cpu,
    check_cpu,
    compiler_options,
    cpu_names,
    onednn_types,
)
from fastvar.errors import BackendError, BuildError


def cpu(capability: str, *, vnni: bool = False, bf16: bool = False, amx: bool = False) -> Any:
    """A torch that finds such a CPU."""
    found = SimpleNamespace(
        _is_vnni_supported=lambda: vnni,
        _is_avx512_bf16_supported=lambda: bf16,
        _is_amx_tile_supported=lambda: amx,
    )
    offered = SimpleNamespace(get_cpu_capability=lambda: capability)
    return SimpleNamespace(cpu=found, backends=SimpleNamespace(cpu=offered))


OLD, PLAIN, SERVER = cpu("AVX2"), cpu("AVX512", vnni=True), cpu("AVX512", vnni=True, bf16=True)
TILES = cpu("AVX512", vnni=True, bf16=True, amx=True)


def test_the_best_that_a_cpu_offers():
    assert [best_cpu(found) for found in (OLD, PLAIN, SERVER, TILES)] == list(cpu_names())


def test_a_cpu_that_nothing_is_made_for():
    with pytest.raises(BackendError, match=r"DEFAULT.*is none that AOTInductor"):
        best_cpu(cpu("DEFAULT"))


def test_less_than_a_cpu_offers_may_be_asked_for_and_more_not():
    assert check_cpu(SERVER, "cpu-avx2") == "cpu-avx2"
    with pytest.raises(BackendError, match="asked for cpu-avx512-bf16, this CPU offers cpu-avx2") as caught:
        check_cpu(OLD, "cpu-avx512-bf16")
    assert "--target cpu-avx2" in caught.value.fix
    with pytest.raises(BuildError, match="no target 'sm86'"):
        check_cpu(SERVER, "sm86")


def test_targets_with_products_of_16_bits():
    fp32, bf16, fp16 = "float32", "bfloat16", "float16"
    assert [accurate_types(name) for name in cpu_names()] == [(fp32,), (fp32,), (fp32, bf16), (fp32, bf16, fp16)]


def test_onednn_is_asked_for_what_every_cpu_of_the_target_does():
    """It emulates bf16 with AVX512, refuses it with AVX2, and refuses fp16 without instructions of its own."""
    assert [onednn_types(name) for name in cpu_names()] == [("float32",), *[("float32", "bfloat16")] * 3]


@pytest.mark.parametrize("name", cpu_names())
def test_the_compiler_is_told_of_the_target_alone(name: str):
    """Never of the CPU that it runs on: an engine runs on every CPU of its target, with any number of threads."""
    options = compiler_options(name)
    assert options["cpp.march"] not in ("native", None, "")
    assert options["cpp.dynamic_threads"]
