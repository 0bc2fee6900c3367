import subprocess
import sys
import threading

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fastvar.core.precision import Precision
from fastvar.core.tensors import TensorRef
from fastvar.engines.onnxruntime.backend import OnnxRuntimeBackend, OrtEngine
from fastvar.engines.onnxruntime.needs import graph_needs
from fastvar.engines.registry import BACKEND_NAMES, get_backend
from fastvar.errors import BackendError, BuildError, BundleError, InternalError
from tests.models.small_bundle import graph, linear, linear_spec, tensor


@pytest.fixture(scope="module")
def backend() -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend()


@pytest.fixture(scope="module")
def engine(backend):
    return backend.load(backend.build(linear()).engine, linear_spec(backend.version()))


def ref(array: np.ndarray) -> TensorRef:
    return TensorRef(array.ctypes.data, str(array.dtype), array.shape)


def operands(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((3, 4), np.float32),
        "w": rng.standard_normal((4, 4), np.float32),
        "y": np.zeros((3, 4), np.float32),
    }


def refs(arrays: dict[str, np.ndarray]) -> dict[str, TensorRef]:
    return {name: ref(array) for name, array in arrays.items()}


def test_reads_inputs_at_launch_and_writes_at_the_given_offset(engine):
    arrays = operands()
    cache = np.full((9, 4), 7, np.float32)
    launch = engine.prepare(refs({**arrays, "y": cache[3:6]}))
    arrays["x"][:] = operands(seed=1)["x"]
    launch()
    np.testing.assert_allclose(cache[3:6], operands(seed=1)["x"] @ arrays["w"], rtol=1e-5)
    assert (cache[:3] == 7).all()
    assert (cache[6:] == 7).all()


def test_reads_inputs_at_an_offset(engine):
    arrays, weights = operands(), np.random.default_rng(2).standard_normal((3, 4, 4)).astype(np.float32)
    engine.prepare(refs({**arrays, "w": weights[1]}))()
    np.testing.assert_allclose(arrays["y"], arrays["x"] @ weights[1], rtol=1e-5)


def test_an_output_that_only_renames_an_input_is_still_written(backend):
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    shape = helper.make_node("Constant", [], ["shape"], value_ints=[4, 3])
    model = graph([shape, node], [tensor("x", [3, 4])], [tensor("y", [4, 3])])
    loaded = backend._session(backend.build(model).engine)
    assert [tuple(o.shape) for o in loaded.get_outputs()] == [(4, 3)]
    x, y = np.arange(12, dtype=np.float32).reshape(3, 4), np.zeros((4, 3), np.float32)
    OrtEngine(backend._ort, loaded, "reshape").prepare({"x": ref(x), "y": ref(y)})()
    np.testing.assert_array_equal(y.reshape(-1), x.reshape(-1))


def test_bfloat16_is_bound_as_bits(backend):
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    model = graph([node], [tensor("x", [2], TensorProto.BFLOAT16)], [tensor("y", [2])])
    cast = OrtEngine(backend._ort, backend._session(backend.build(model).engine), "cast")
    bits, y = np.array([0x3F80, 0xC000], np.uint16), np.zeros(2, np.float32)
    cast.prepare({"x": TensorRef(bits.ctypes.data, "bfloat16", (2,)), "y": ref(y)})()
    np.testing.assert_array_equal(y, [1.0, -2.0])


def test_two_threads_on_different_memory(engine):
    work = [operands(seed) for seed in (3, 4)]
    launches = [engine.prepare(refs(arrays)) for arrays in work]
    wrong = []

    def run(arrays, launch):
        expected = arrays["x"] @ arrays["w"]
        for _ in range(300):
            arrays["y"][:] = 0
            launch()
            if not np.allclose(arrays["y"], expected, rtol=1e-5, atol=1e-6):
                wrong.append(arrays)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(work, launches, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_missing_and_extra_names(engine):
    tensors = refs(operands())
    tensors["z"] = tensors.pop("w")
    with pytest.raises(InternalError, match=r"missing \['w'\], not its own \['z'\]"):
        engine.prepare(tensors)


@pytest.mark.parametrize(
    ("changed", "got"),
    [
        (np.zeros((4, 4), np.float16), r"got float16\[4, 4\], expected float32\[4, 4\]"),
        (np.zeros((4, 5), np.float32), r"got float32\[4, 5\], expected float32\[4, 4\]"),
    ],
)
def test_wrong_shape_or_type(engine, changed, got):
    with pytest.raises(InternalError, match=f"'linear', tensor 'w': {got}"):
        engine.prepare(refs({**operands(), "w": changed}))


def test_build_is_deterministic_and_drops_the_exporters_notes(backend):
    model = onnx.load_model_from_string(linear())
    model.producer_name = "exporter"
    model.doc_string = "from /home/somebody/model.py"
    model.graph.node[0].metadata_props.add(key="stack_trace", value="/home/somebody/model.py")
    annotated = backend.build(model.SerializeToString()).engine
    assert annotated == backend.build(linear()).engine
    assert b"somebody" not in annotated


@pytest.mark.parametrize("graph_bytes", [b"", b"\x01\x02not onnx", b"\x00" * 64], ids=["empty", "text", "zeros"])
def test_bytes_that_are_no_graph(backend, graph_bytes):
    with pytest.raises(BuildError, match="not a valid ONNX graph"):
        backend.build(graph_bytes)


def _relu(shape=(4,), out=(4,), dtype=TensorProto.FLOAT, opset=20, op="Relu"):
    return graph([helper.make_node(op, ["x"], ["y"])], [tensor("x", shape, dtype)], [tensor("y", out, dtype)], opset)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_relu(op="Nonesuch"), "Nonesuch_0"),
        (_relu(out=(5,)), "Relu_0"),
        (_relu(dtype=TensorProto.BFLOAT16), "Relu_0"),
        (_relu(opset=99), "opset"),
        (_relu(shape=("n",), out=("n",)), "'x' has shape"),
        (graph([], [], []), "no inputs"),
        (graph([], [tensor("x", [4])], []), "no outputs"),
    ],
    ids=["unknown-op", "shape", "no-kernel", "opset", "dynamic", "no-inputs", "no-outputs"],
)
def test_rejected_graphs_name_the_culprit(backend, model, message):
    with pytest.raises(BuildError, match=message):
        backend.build(model)


def test_other_targets_are_refused(backend):
    with pytest.raises(BuildError, match="target 'sm86'"):
        backend.resolve_target("sm86", Precision())


def test_other_precisions_are_refused(backend):
    with pytest.raises(BuildError, match="does not compute in bfloat16"):
        backend.resolve_target(None, Precision("bfloat16"))


def test_a_failing_run_names_the_engine_and_recovers(backend, capfd):
    node = helper.make_node("Gather", ["x", "i"], ["y"])
    model = graph([node], [tensor("x", [4]), tensor("i", [2], TensorProto.INT64)], [tensor("y", [2])])
    gather = OrtEngine(backend._ort, backend._session(backend.build(model).engine), "gather")
    arrays = {"x": np.arange(4, dtype=np.float32), "i": np.array([0, 9]), "y": np.zeros(2, np.float32)}
    launch = gather.prepare(refs(arrays))
    with pytest.raises(BackendError, match=r"engine 'gather'.*out of data bounds"):
        launch()
    arrays["i"][1] = 3
    launch()
    np.testing.assert_array_equal(arrays["y"], [0, 3])
    assert capfd.readouterr().err == ""


def test_load_refuses_an_engine_that_differs_from_its_manifest(backend):
    with pytest.raises(BundleError, match="engine 'linear' takes and gives other tensors"):
        backend.load(backend.build(linear(rows=5)).engine, linear_spec(backend.version()))


def test_load_refuses_bytes_that_are_no_engine(backend):
    with pytest.raises(BackendError, match="cannot load engine 'linear'"):
        backend.load(b"garbage", linear_spec(backend.version()))


@pytest.mark.parametrize(
    ("built", "accepted"),
    [("1.30.0", True), ("1.23.4", True), ("1.30.1", True), ("1.32.0", True), ("2.0.0", False), ("0.9", False),
     ("1.30.0+cuda", True), ("unknown", False)],
)  # fmt: skip
def test_versions_that_may_be_loaded(backend, monkeypatch, built, accepted):
    monkeypatch.setattr(backend, "version", lambda: "1.30.0")
    assert backend.accepts(built) is accepted
    if not accepted:
        with pytest.raises(BackendError, match=f"was built with onnxruntime {built}"):
            backend.load(b"never read", linear_spec(built))


def test_an_older_library_runs_what_a_newer_one_built(backend, monkeypatch):
    """The number of its version alone is no reason to refuse an engine."""
    engine = backend.build(linear()).engine
    monkeypatch.setattr(backend, "version", lambda: "1.23.2")
    arrays = operands()
    backend.load(engine, linear_spec("1.32.0")).prepare(refs(arrays))()
    np.testing.assert_allclose(arrays["y"], arrays["x"] @ arrays["w"], rtol=1e-5)


def _newer(**changes: int) -> bytes:
    """linear() as a later exporter might write it: an IR version, or a version of an operator set by its domain."""
    model = onnx.load_model_from_string(linear())
    model.ir_version = changes.pop("ir_version", model.ir_version)
    for domain, version in changes.items():
        model.opset_import.append(helper.make_opsetid(domain.replace("_", "."), version))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("graph_bytes", "asked"),
    [
        (_newer(ir_version=99), "IR version 99, operators of ONNX 20"),
        (_newer(com_microsoft=77), "IR version 10, operators of ONNX 20 and com.microsoft 77"),
        (_relu(opset=99), "IR version 10, operators of ONNX 99"),
    ],
    ids=["ir", "contributed", "opset"],
)
def test_a_graph_that_asks_for_more_than_the_library_has_is_refused_in_words(backend, graph_bytes, asked):
    with pytest.raises(BackendError, match=r"cannot load engine 'linear', built with 1\.99\.0: ") as error:
        backend.load(graph_bytes, linear_spec("1.99.0"))
    assert error.value.expected == f"a version that knows {asked}"
    assert error.value.fix == "install onnxruntime 1.99.0, or rebuild the bundle"


def test_needs_are_those_that_onnx_reads():
    for model in (linear(), _newer(ir_version=300, com_microsoft=1, ai_onnx_ml=5), _relu(opset=23)):
        read = onnx.load_model_from_string(model)
        needs = graph_needs(model)
        assert needs is not None
        assert needs.ir_version == read.ir_version
        assert needs.opsets == {opset.domain: opset.version for opset in read.opset_import}


@given(st.binary(max_size=200) | st.integers(0, 400).map(lambda n: linear()[:n]))
def test_any_bytes_have_needs_or_none(data):
    assert graph_needs(data) is None or graph_needs(data).ir_version > 0


def test_missing_library_names_the_extra(monkeypatch):
    """`None` among the modules that are there is how Python is told that there is none."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"pip install \"fastvar-runtime\[onnxruntime\]\""):
        get_backend("onnxruntime")


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(BackendError, match=f"expected: one of {', '.join(BACKEND_NAMES)}"):
        get_backend("tensorflow")


def test_threads_must_be_positive():
    with pytest.raises(BackendError, match="0 threads"):
        OnnxRuntimeBackend(threads=0)


def test_loading_needs_no_onnx_package(backend, tmp_path):
    (tmp_path / "engine").write_bytes(backend.build(linear()).engine)
    program = f"""
import sys
sys.modules["onnx"] = None
from fastvar.engines.spec import EngineReport, EngineSpec, TensorSpec
from fastvar.engines.registry import get_backend
backend = get_backend("onnxruntime")
spec = EngineSpec(**{{**{vars(linear_spec(backend.version()))!r}}})
backend.load(open({str(tmp_path / "engine")!r}, "rb").read(), spec)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
