import contextlib
import dataclasses
import lzma
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fastvar.core.precision import Precision
from fastvar.engines.registry import get_backend
from fastvar.engines.spec import EngineSpec
from fastvar.engines.tensorrt.backend import TensorRTRTXBackend
from fastvar.engines.tensorrt.build_log import BuildLog
from fastvar.engines.tensorrt.cuda_device import GpuFacts
from fastvar.errors import BackendError, BuildError
from tests.models.small_bundle import graph, linear, linear_spec, tensor

pytest.importorskip("tensorrt_rtx")

without_gpu = pytest.mark.skipif(
    Path("/proc/driver/nvidia/version").exists(), reason="says what happens without an NVIDIA driver"
)
MANY = "sm86,sm89,sm120"


@pytest.fixture(scope="module")
def backend() -> TensorRTRTXBackend:
    return TensorRTRTXBackend()


def product(dtype: int) -> bytes:
    """y = x @ w, in one element type throughout."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return graph([node], [tensor("x", [3, 4], dtype), tensor("w", [4, 4], dtype)], [tensor("y", [3, 4], dtype)])


def single(op: str, inputs: list[tuple[str, list[int | str]]], out: list[int | str], dtype: int = TensorProto.FLOAT):
    """A graph of one node that takes and gives fp32, or gives another type."""
    node = helper.make_node(op, [name for name, _ in inputs], ["y"])
    return graph([node], [tensor(name, shape) for name, shape in inputs], [tensor("y", out, dtype)])


def top(count: int) -> bytes:
    """The `count` largest of 8000 numbers."""
    nodes = [
        helper.make_node("Constant", [], ["k"], value_ints=[count]),
        helper.make_node("TopK", ["x", "k"], ["y", "places"]),
    ]
    outputs = [tensor("y", [count]), tensor("places", [count], TensorProto.INT64)]
    return graph(nodes, [tensor("x", [8000])], outputs)


class OnRtx3090(TensorRTRTXBackend):
    def device(self):
        return SimpleNamespace(gpu_facts=lambda: GpuFacts("NVIDIA GeForce RTX 3090", "sm86", (13, 0), 24 << 30))


def spec_for(target: str = "sm86", library_version: str = "", backend: str = "tensorrt-rtx") -> EngineSpec:
    version = library_version or TensorRTRTXBackend().version()
    return dataclasses.replace(linear_spec(version), backend=backend, target=target)


@pytest.mark.parametrize("target", ["sm86", MANY, "any"])
@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_an_engine_is_built_without_a_gpu_and_packed(backend, target, dtype):
    built = backend.build(product(dtype), target)
    assert len(lzma.decompress(built.engine)) > len(built.engine)
    assert built.report.kernels > 0
    assert built.report.scratch_bytes >= 0


def test_a_rebuild_gives_the_same_bytes_and_another_target_does_not(backend):
    assert backend.build(linear(), MANY).engine == backend.build(linear(), MANY).engine
    assert backend.build(linear(), MANY).engine != backend.build(linear(), "sm86").engine


@pytest.mark.parametrize("target", ["sm75", "sm75,sm86", "sm86,sm75"])
def test_every_gpu_of_a_list_is_compiled_for(backend, target):
    with pytest.raises(BuildError, match="sm75"):
        backend.build(product(TensorProto.BFLOAT16), target)


def test_turing_is_no_target(backend):
    """The library lists it, and builds fp16 for it, but no fp32 matrix product, which modulation is made of."""
    assert backend.build(product(TensorProto.FLOAT16), "sm75").report.kernels > 0
    with pytest.raises(BuildError, match="FP32 GEMM is not supported"):
        backend.build(product(TensorProto.FLOAT), "sm75")
    with pytest.raises(BuildError, match=r"builds for no GPU 'sm75'\nexpected: a list of sm80, sm86"):
        backend.resolve_target("sm75", Precision("float16"))


@pytest.mark.parametrize(
    ("asked", "resolved"),
    [("SM89, sm86", "sm86,sm89"), ("sm120,sm86,sm120", "sm86,sm120"), ("sm86", "sm86"), ("any", "any"), ("ANY", "any")],
)
def test_targets_have_one_spelling(backend, asked, resolved):
    assert backend.resolve_target(asked, Precision("bfloat16")) == resolved


@pytest.mark.parametrize("target", ["sm90", "rtx3090", "sm86,", "sm86,any", "sm86,current"])
def test_unknown_gpus_are_refused_with_the_known_ones(backend, target):
    with pytest.raises(BuildError, match=r"builds for no GPU '(sm90|rtx3090||any|current)'\n.*sm80, sm86, sm89, sm120"):
        backend.resolve_target(target, Precision())


@without_gpu
@pytest.mark.parametrize("target", [None, "current"])
def test_the_current_gpu_must_be_there(backend, target):
    with pytest.raises(BuildError, match=r"no NVIDIA driver[^\n]*\nexpected: .*sm86.*\nfix: give --target, sm86"):
        backend.resolve_target(target, Precision("bfloat16"))


@pytest.mark.parametrize("target", ["sm86", "sm89,sm86", "sm80", "any"])
def test_fp8_weights_need_sm89_in_the_whole_list(backend, target):
    with pytest.raises(BuildError, match=r"no fp8[^\n]*\nexpected: sm89 or newer[^\n]*\nfix: [^\n]*--weights int8"):
        backend.resolve_target(target, Precision("bfloat16", "float8_e4m3fn"))
    assert backend.resolve_target("sm120,sm89", Precision("bfloat16", "float8_e4m3fn")) == "sm89,sm120"


def test_element_types_that_no_gpu_here_computes_in_are_refused(backend):
    with pytest.raises(BuildError, match=r"tensorrt-rtx does not compute in float64"):
        backend.resolve_target("sm86", Precision("float64"))


@pytest.mark.parametrize(
    ("model", "culprit"),
    [
        (single("Det", [("x", [2, 3, 3])], [2]), r"node Det_0 \(Det\)"),
        (single("Unique", [("x", [4])], ["n"]), r"node Unique_0 \(Unique\)"),
        (single("Multinomial", [("x", [2, 3])], [2, 1], TensorProto.INT32), r"node Multinomial_0 \(Multinomial\)"),
    ],
    ids=["Det", "Unique", "Multinomial"],
)
def test_a_rejected_operator_is_named_with_its_node(backend, model, culprit):
    with pytest.raises(BuildError, match=f"tensorrt-rtx [0-9.]+ rejects {culprit}"):
        backend.build(model, "sm86")


def test_what_the_parser_takes_and_the_builder_does_not_is_said_in_its_words(backend):
    assert backend.build(top(3840), "sm86").report.kernels > 0
    with pytest.raises(BuildError, match=r"cannot build the graph: .*K exceeds the maximum value allowed"):
        backend.build(top(3841), "sm86")


@pytest.mark.parametrize(
    "model",
    [b"", b"\x01\x02not onnx", b"\x00" * 64, linear()[: len(linear()) // 2], graph([], [tensor("x", [4])], [])],
    ids=["empty", "text", "zeros", "truncated", "no-outputs"],
)
def test_what_is_no_graph_is_a_build_error(backend, model):
    with pytest.raises(BuildError, match=r"not a valid ONNX graph|has no outputs"):
        backend.build(model, "sm86")


def test_a_shape_that_is_not_static_is_refused(backend):
    with pytest.raises(BuildError, match="dynamic"):
        backend.build(single("Relu", [("x", ["n"])], ["n"]), "sm86")


@settings(max_examples=200, deadline=None)
@example({34: 128, 7: 1, 8: 128})  # a name that is no text
@given(st.dictionaries(st.integers(0, len(linear()) - 1), st.integers(0, 255), min_size=1, max_size=4))
def test_a_damaged_graph_builds_or_is_a_build_error(changes):
    """Anything else would end the process: the library is C++."""
    damaged = bytearray(linear())
    for place, value in changes.items():
        damaged[place] = value
    with contextlib.suppress(BuildError):
        TensorRTRTXBackend().build(bytes(damaged), "sm86")


@without_gpu
def test_without_a_driver_there_is_no_device_and_the_reason_is_one_line(backend):
    with pytest.raises(BackendError) as device:
        backend.device()
    with pytest.raises(BackendError) as load:
        backend.load(backend.build(linear(), "sm86").engine, spec_for())
    for error in (device, load):
        assert "no NVIDIA driver" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", ["1.7.1.115", "1.7.1", "1.8.0.1"])
def test_an_engine_of_another_library_version_is_refused_before_it_is_read(backend, version):
    with pytest.raises(BackendError, match=f"built with tensorrt-rtx {version}, version {backend.version()}"):
        backend.load(b"never read", spec_for(library_version=version))


def test_an_engine_of_another_backend_is_refused(backend):
    with pytest.raises(BackendError, match="for backend onnxruntime"):
        backend.load(b"never read", spec_for(backend="onnxruntime"))


@pytest.mark.parametrize("target", ["sm86", "sm80,sm86", "any"])
def test_an_engine_for_this_gpu_is_accepted(target):
    OnRtx3090().check(spec_for(target))


@pytest.mark.parametrize("target", ["sm89", "sm80,sm89"])
def test_an_engine_for_other_gpus_is_refused_with_the_target_to_rebuild_for(target):
    message = rf"built for {target}, this GPU is sm86 \(NVIDIA GeForce RTX 3090\)\n[^\n]*\nfix: .*--target sm86"
    with pytest.raises(BackendError, match=message):
        OnRtx3090().check(spec_for(target))


@pytest.mark.parametrize("target", [None, "current"])
def test_the_current_gpu_is_written_down_by_its_name(target):
    """A bundle says what it was built for, wherever it is opened."""
    assert OnRtx3090().resolve_target(target, Precision("bfloat16")) == "sm86"


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"pip install \"fastvar-runtime\[tensorrt\]\""):
        get_backend("tensorrt")


LAYERS = """Layers:
Name: __myl_Move_myl0_0, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [2,3] }], StreamId: 0
Name: __mye_signal_0, LayerType: signal, Inputs: [], StreamId: 0
Name: _gemm_mha_v2_myl0_3, LayerType: kgen, Inputs: [ { Name: q, Dimensions: [6,12,16] }], StreamId: 0
Name: __mye_wait_0, LayerType: wait, Inputs: [], StreamId: 1
Name: __myl_FcAdd_myl0_5, LayerType: runtime_fusion, Inputs: [], StreamId: 0, Metadata: [ONNX Layer: node_mha]
Name: _gemm_mha_v2_myl0_9, LayerType: kgen, Inputs: [], StreamId: 0
"""


def log_of(*messages: tuple[str, str], only_errors: bool = False) -> BuildLog:
    log = BuildLog(only_errors)
    for severity, text in messages:
        log.add(severity, text)
    return log


def test_a_report_counts_kernels_fused_attentions_and_scratch():
    report = log_of(
        ("INFO", "Total Host Persistent Memory: 80 bytes"),
        ("INFO", "Total Activation Memory: 8214016 bytes"),
        ("INFO", "Total Weights Memory: 9999999999 bytes"),
        ("VERBOSE", LAYERS),
    ).report()
    assert (report.kernels, report.fused_attentions, report.scratch_bytes) == (4, 2, 8214016)


def test_a_log_without_layers_reports_nothing():
    report = log_of(("INFO", "Total Weights Memory: 1856 bytes")).report()
    assert (report.kernels, report.fused_attentions, report.scratch_bytes) == (0, 0, 0)


def test_the_reason_is_the_last_error():
    failures = [("ERROR", "first"), ("INTERNAL_ERROR", "second"), ("WARNING", "afterwards"), ("INFO", "done")]
    assert log_of(*failures).reason() == "second"
    assert log_of(("WARNING", "afterwards")).reason() == "no reason given"


def test_a_log_of_errors_keeps_nothing_else():
    log = log_of(("VERBOSE", LAYERS), ("ERROR", "first"), ("INFO", "done"), only_errors=True)
    assert log.messages == [("ERROR", "first")]


def test_a_folder_of_stubs_is_no_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(BackendError, match=r"tensorrt is an empty folder of that name") as caught:
        get_backend("tensorrt").version()
    assert "fastvar-runtime[tensorrt]" in caught.value.fix
