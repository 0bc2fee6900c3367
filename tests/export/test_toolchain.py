from dataclasses import replace

import pytest

from fastvar.core.precision import Precision, PrecisionChoice, parse_precision
from fastvar.engines.aotinductor import targets as cpu_target
from fastvar.engines.cache.engine_cache import EngineCache
from fastvar.engines.registry import backend_class, get_backend
from fastvar.engines.spec import EngineReport
from fastvar.errors import BackendError, BuildError, PlanError
from fastvar.export.factory import BuiltEngine, EngineFactory
from fastvar.export.models.common.step_graph import StepGraph
from fastvar.export.models.infinity.blocks import AttnMlp
from fastvar.export.models.infinity.weights import transformer_weights
from fastvar.export.toolchain import Toolchain, make_toolchain
from fastvar.families.infinity import TransformerConfig

W8A8 = Precision("bfloat16", "int8", "int8")
HEADS_OF_64 = TransformerConfig(
    depth=1, width=128, heads=2, mlp_width=256, text_width=128, text_length=8, code_channels=8
)


def rtx(precision: str | None = None, allow_unfused: bool = False) -> Toolchain:
    pytest.importorskip("tensorrt_rtx")
    return make_toolchain("tensorrt-rtx", "sm86", precision, allow_unfused=allow_unfused)


def test_the_default_is_fp32_on_this_cpu():
    tools = make_toolchain()
    assert (tools.backend.name, tools.target, tools.precision) == ("onnxruntime", "cpu", Precision("float32"))
    assert not tools.allow_unfused


@pytest.mark.parametrize("word", [None, "auto"])
def test_why_it_computes_so_is_noted(word: str | None):
    tools = make_toolchain(precision=word)
    assert tools.told == "fp32, auto: onnxruntime computes in it unless it is asked for another"
    tools = make_toolchain(precision="fp32")
    assert (tools.choice, tools.told) == (PrecisionChoice(True), "fp32, asked for")


def test_gpu_engines_are_bfloat16_by_default():
    tools = rtx()
    assert (tools.backend.name, tools.target, tools.precision) == ("tensorrt-rtx", "sm86", Precision("bfloat16"))


def test_words_of_the_command_line_become_element_types():
    pytest.importorskip("tensorrt_rtx")
    tools = make_toolchain("tensorrt-rtx", "SM120,sm89", "fp16", "fp8", allow_unfused=True)
    assert tools.target == "sm89,sm120"
    assert tools.precision == Precision("float16", "float8_e4m3fn")
    assert tools.allow_unfused


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"backend": "tensorflow"}, BackendError, "no backend 'tensorflow'"),
        ({"precision": "float16"}, PlanError, "no precision 'float16'\nexpected: one of auto, fp32, bf16, fp16"),
        ({"weights": "int4"}, PlanError, "no weight format 'int4'\nexpected: one of int8, fp8"),
        ({"precision": "bf16"}, BuildError, "onnxruntime does not compute in bfloat16"),
        ({"target": "sm86"}, BuildError, "onnxruntime does not build for target 'sm86'"),
        ({"weights": "w8a8"}, PlanError, "--weights w8a8 in fp32\nexpected: bf16.*\nfix: .*--precision bf16"),
        ({"weights": "w8a8", "precision": "bf16"}, BuildError, "onnxruntime does not compute in bfloat16"),
    ],
    ids=["backend", "precision", "weights", "compute", "target", "activations", "backend-of-activations"],
)
def test_what_a_backend_does_not_do_is_refused(words, error, message):
    with pytest.raises(error, match=message):
        make_toolchain(**words)


@pytest.mark.parametrize("name", ["tensorrt-rtx", "tensorrt"])
def test_only_aotinductor_quantises_activations(name):
    backend = backend_class(name)
    with pytest.raises(BuildError, match=rf"{name} does not quantise activations\nexpected: --backend aotinductor"):
        backend.check_precision(W8A8)


def test_quantised_activations_are_rounded_to_bf16_whatever_the_default(monkeypatch):
    chosen = ("float32", PrecisionChoice(False, "measured"))
    monkeypatch.setattr(backend_class("aotinductor"), "auto_precision", lambda self, kept: chosen)
    monkeypatch.setattr(cpu_target, "_offered", lambda torch: cpu_target.cpu_names()[:3])
    assert make_toolchain("aotinductor", weights="w8a8").precision == W8A8
    assert make_toolchain("aotinductor", weights="int8").precision == Precision("float32", "int8")


def test_quantised_activations_need_integer_products(monkeypatch):
    backend = get_backend("aotinductor")
    monkeypatch.setattr(cpu_target, "_offered", lambda torch: cpu_target.cpu_names())
    for target in ("cpu-avx512", "cpu-avx512-bf16"):
        assert backend.resolve_target(target, W8A8) == target
    with pytest.raises(BuildError, match=r"cpu-avx2 has no instructions for --weights w8a8\nexpected: .*cpu-avx512"):
        backend.resolve_target("cpu-avx2", W8A8)
    assert backend.resolve_target("cpu-avx2", Precision("bfloat16", "int8")) == "cpu-avx2"
    gpu = get_backend("aotinductor", target="cuda")
    with pytest.raises(BuildError, match="w8a8 is for CPUs"):
        gpu.resolve_target("cuda", W8A8)


@pytest.mark.parametrize(
    ("words", "precision", "label"),
    [
        (("bf16", None), Precision("bfloat16"), "bf16"),
        (("fp16", "fp8"), Precision("float16", "float8_e4m3fn"), "fp16 with fp8 weights"),
        (("bf16", "int8"), Precision("bfloat16", "int8"), "bf16 with int8 weights"),
        (("bf16", "w8a8"), W8A8, "bf16 with int8 weights and activations"),
    ],
)
def test_a_precision_is_told_in_words(words, precision, label):
    assert parse_precision(*words) == precision
    assert precision.label == label


@pytest.mark.parametrize("wrong", [("float16", "int8", "int8"), ("bfloat16", "", "int8"), ("bfloat16", "int8", "int4")])
def test_activations_are_quantised_with_int8_weights_in_bf16_alone(wrong):
    with pytest.raises(PlanError, match="w8a8"):
        Precision(*wrong)


@pytest.mark.parametrize("fused", [0, 1])
def test_an_attention_in_pieces_is_refused_with_the_engine_and_the_way_out(fused):
    report = EngineReport(kernels=20, fused_attentions=fused)
    with pytest.raises(
        BuildError, match=rf"engine 'attn_mlp-8x8': {fused} of 2 attentions.*\n.*\nfix: .*--allow-unfused"
    ):
        make_toolchain().check_fused("attn_mlp-8x8", 2, report)


@pytest.mark.parametrize(
    ("attentions", "report", "allow_unfused"),
    [
        (2, EngineReport(kernels=20, fused_attentions=2), False),
        (0, EngineReport(kernels=20), False),
        (1, EngineReport(kernels=20, fused_attentions=2), False),
        (2, EngineReport(), False),
        (2, EngineReport(kernels=20), True),
    ],
    ids=["all-fused", "none-to-fuse", "one-more", "no-kernels-reported", "allowed"],
)
def test_engines_that_are_accepted(attentions, report, allow_unfused):
    replace(make_toolchain(), allow_unfused=allow_unfused).check_fused("attn_mlp", attentions, report)


def make_attend(tools: Toolchain, cache: EngineCache | None = None) -> BuiltEngine:
    sizes = {"rows": 2, "size": (4, 4), "kept": 16, "past": 5, "text_length": 8, "cached_size": None, "fills": False}
    graph = StepGraph("attn_mlp", AttnMlp, {"config": HEADS_OF_64, **sizes}, "transformer.blocks.{layer}.")
    factory = EngineFactory(tools, cache, transformer_weights(HEADS_OF_64, {}))
    return factory.make({"attn_mlp-4x4": graph}, done=lambda _: None)["attn_mlp-4x4"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_both_attentions_of_a_block_become_one_kernel_each_in_16_bits(precision):
    built = make_attend(rtx(precision))
    assert (built.attentions, built.engine.report.fused_attentions) == (2, 2)


def test_fp32_attentions_stay_in_pieces_and_are_refused_unless_allowed(tmp_path):
    """Refused too where the engine is in the cache, from a build that allowed it."""
    cache = EngineCache(tmp_path)
    with pytest.raises(BuildError, match=r"engine 'attn_mlp-4x4': 0 of 2 attentions"):
        make_attend(rtx("fp32"))
    built = make_attend(rtx("fp32", allow_unfused=True), cache)
    assert (built.attentions, built.engine.report.fused_attentions) == (2, 0)
    assert built.engine.report.kernels > 0
    with pytest.raises(BuildError, match=r"engine 'attn_mlp-4x4': 0 of 2 attentions"):
        make_attend(rtx("fp32"), cache)


def test_a_backend_that_reports_no_kernels_is_not_asked():
    assert make_attend(make_toolchain()).engine.report == EngineReport()
