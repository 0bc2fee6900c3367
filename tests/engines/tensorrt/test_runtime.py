"""TensorRT engines on a fake GPU: what is refused, what is bound, and the kernels kept from run to run."""

from __future__ import annotations

import importlib
import logging
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvar.core.tensors import Scratch, TensorRef
from fastvar.engines.base import Engine
from fastvar.engines.cache.lock import FolderLock
from fastvar.engines.device import Allocation
from fastvar.engines.spec import EngineSpec
from fastvar.errors import BackendError, BundleError, InternalError
from tests.fakes import tensorrt as fake_tensorrt
from tests.fakes.cuda import FakeDriver
from tests.fakes.tensorrt import FakeBackend, FakeTensorRT, gpu_spec, plan_of
from tests.models.small_bundle import linear, linear_spec

SCRATCH_BYTES = 1000
SPEC = gpu_spec(linear_spec())


def packed(scratch_bytes: int = SCRATCH_BYTES, rows: int = 3) -> bytes:
    return lzma.compress(plan_of(linear(rows), scratch_bytes))


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


class Operands:
    """Device memory for y = x @ w, and scratch memory behind it."""

    def __init__(self, backend: FakeBackend, seed: int = 0) -> None:
        self.device = backend.device()
        self.memory: Allocation = self.device.allocate(4096)
        shapes = {"x": (3, 4), "w": (4, 4), "y": (3, 4)}
        self.refs = {
            name: TensorRef(self.memory.address + 256 * i, "float32", shape)
            for i, (name, shape) in enumerate(shapes.items())
        }
        self.scratch = Scratch(self.memory.address + 1024, SCRATCH_BYTES)
        rng = np.random.default_rng(seed)
        self.values = {name: rng.standard_normal(shapes[name]).astype(np.float32) for name in ("x", "w")}
        for name, values in self.values.items():
            self.device.write(self.refs[name], values)

    @property
    def expected(self) -> np.ndarray:
        return self.values["x"] @ self.values["w"]

    def result(self) -> np.ndarray:
        return self.device.read(self.refs["y"])


# Running


def test_launch_runs_on_the_memory_it_was_prepared_for(backend: FakeBackend):
    engine, one, other = backend.load(packed(), SPEC), Operands(backend, 1), Operands(backend, 2)
    launches = [engine.prepare(operands.refs, operands.scratch) for operands in (one, other)]
    for launch in launches:
        launch()
    for operands in (one, other):
        np.testing.assert_allclose(operands.result(), operands.expected, rtol=1e-5)


def test_recorded_launches_keep_their_own_addresses(backend: FakeBackend):
    """One context serves all: what is bound last must not reach back into the recording."""
    engine, one, other = backend.load(packed(), SPEC), Operands(backend, 1), Operands(backend, 2)
    launches = [engine.prepare(operands.refs, operands.scratch) for operands in (one, other)]
    recorded = backend.device().capture_graph(launches)
    for operands in (one, other):
        operands.device.write(operands.refs["y"], np.float32(0))
    launches[1]()
    recorded()
    for operands in (one, other):
        np.testing.assert_allclose(operands.result(), operands.expected, rtol=1e-5)


def test_engine_without_scratch_needs_none(backend: FakeBackend):
    engine, operands = backend.load(packed(scratch_bytes=0), SPEC), Operands(backend)
    assert engine.scratch_bytes == 0
    engine.prepare(operands.refs)()
    np.testing.assert_allclose(operands.result(), operands.expected, rtol=1e-5)


def test_setting_up_an_engine_allocates_nothing(backend: FakeBackend):
    backend.load(packed(), SPEC)
    assert backend.driver.allocated_bytes == 0


@pytest.mark.parametrize("scratch", [None, SCRATCH_BYTES - 1])
def test_too_little_scratch_is_a_bug(backend: FakeBackend, scratch: int | None):
    engine, operands = backend.load(packed(), SPEC), Operands(backend)
    given = None if scratch is None else replace(operands.scratch, size_bytes=scratch)
    with pytest.raises(InternalError, match=rf"'linear' needs 1000 bytes of scratch, it is given {scratch or 0}"):
        engine.prepare(operands.refs, given)


def test_missing_and_strange_names_are_a_bug(backend: FakeBackend):
    engine, operands = backend.load(packed(), SPEC), Operands(backend)
    tensors = dict(operands.refs)
    tensors["z"] = tensors.pop("w")
    with pytest.raises(InternalError, match=r"missing \['w'\], not its own \['z'\]"):
        engine.prepare(tensors, operands.scratch)


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"shape": (4, 3)}])
def test_wrong_type_or_shape_is_a_bug(backend: FakeBackend, change: dict[str, object]):
    engine, operands = backend.load(packed(), SPEC), Operands(backend)
    with pytest.raises(InternalError, match=r"'linear', tensor 'x'"):
        engine.prepare({**operands.refs, "x": replace(operands.refs["x"], **change)}, operands.scratch)


def test_launch_that_the_library_refuses_says_why(backend: FakeBackend):
    engine, operands = backend.load(packed(), SPEC), Operands(backend)
    launch = engine.prepare(operands.refs, operands.scratch)
    backend.library.refuses = "cuBLAS has a bad day"
    with pytest.raises(BackendError, match=r"engine 'linear' does not run: cuBLAS has a bad day"):
        launch()


def test_address_that_the_library_refuses_says_why(backend: FakeBackend):
    """The library wants 256-byte alignment of every tensor."""
    engine, operands = backend.load(packed(), SPEC), Operands(backend)
    crooked = replace(operands.refs["x"], address=operands.refs["x"].address + 4)
    with pytest.raises(BackendError, match=r"engine 'linear' does not run: tensor x cannot be at"):
        engine.prepare({**operands.refs, "x": crooked}, operands.scratch)()


# Loading


def test_plan_that_the_library_does_not_take(backend: FakeBackend):
    with pytest.raises(BackendError, match=r"engine 'linear' is not accepted by this GPU: the plan's magic tag") as e:
        backend.load(lzma.compress(b"no plan"), SPEC)
    assert "rebuild" in e.value.fix


def test_file_that_is_not_packed_is_no_crash(backend: FakeBackend):
    with pytest.raises((BackendError, BundleError), match="linear"):
        backend.load(plan_of(linear()), SPEC)


def test_engine_that_cannot_be_set_up(backend: FakeBackend):
    backend.library.no_contexts = True
    with pytest.raises(BackendError, match=r"engine 'linear' cannot be set up: the context cannot be made"):
        backend.load(packed(), SPEC)


def test_engine_that_differs_from_its_manifest(backend: FakeBackend):
    with pytest.raises(BundleError, match=r"other tensors than the manifest says: \['x', 'y'\]"):
        backend.load(packed(rows=5), SPEC)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (replace(SPEC, target="sm89"), ("sm89", "sm86 (NVIDIA GeForce RTX 3090)")),
        (replace(SPEC, target="sm80,sm120"), ("sm80,sm120", "sm86")),
        (replace(SPEC, library_version="1.6.0"), ("1.6.0", fake_tensorrt.VERSION)),
        (replace(SPEC, backend="tensorrt"), ("tensorrt", "linear")),
    ],
    ids=["GPU", "GPUs", "version", "backend"],
)
def test_engine_for_something_else_is_refused_unread(backend: FakeBackend, spec: EngineSpec, named: tuple[str, str]):
    with pytest.raises(BackendError) as error:
        backend.load(packed(), spec)
    for name in named:
        assert name in error.value.problem
    assert error.value.expected
    assert backend.library.plans == []


@pytest.mark.parametrize("target", ["sm86", "sm80,sm86", "any"])
def test_engine_for_several_gpus(backend: FakeBackend, target: str):
    assert backend.load(packed(), replace(SPEC, target=target)).name == "linear"


# Kernels kept from run to run


def load(folder: Path | None, environment: str = "driver 13.0", rows: int = 3) -> FakeBackend:
    """A new process, as it were: load one engine, and keep its kernels."""
    driver = FakeDriver()
    backend = FakeBackend(driver, folder, FakeTensorRT(driver, environment))
    spec = replace(SPEC, inputs=(replace(SPEC.inputs[0], shape=(rows, 4)), SPEC.inputs[1]))
    spec = replace(spec, outputs=(replace(SPEC.outputs[0], shape=(rows, 4)),))
    backend.load(packed(rows=rows), spec)
    backend.save_compiled_kernels()
    return backend


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_kernels_are_finished_once(tmp_path: Path):
    folder = tmp_path / "kernels"
    assert load(folder).library.compiled == 1
    assert load(folder).library.compiled == 0
    assert files(folder) == [f"tensorrt-rtx-{fake_tensorrt.VERSION}-sm86-nvidia-geforce-rtx-3090.kernels"]


def test_new_kernels_join_the_old(tmp_path: Path):
    for rows in (3, 5):
        assert load(tmp_path, rows=rows).library.compiled == 1
    for rows in (3, 5):
        assert load(tmp_path, rows=rows).library.compiled == 0


def test_nothing_new_is_not_saved(tmp_path: Path):
    load(tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.stat().st_mtime_ns, path.stat().st_ino
    load(tmp_path).save_compiled_kernels()
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load(None).library.compiled == 1
    assert files(tmp_path) == []


@pytest.mark.parametrize("environment", ["driver 9", "driver 14.0"], ids=["another length", "the same length"])
def test_kernels_of_another_driver_are_made_anew_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, environment: str
):
    load(tmp_path, environment)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).library.compiled == 1
    assert "is of another driver or GPU and will be made anew" in caplog.text
    caplog.clear()
    assert load(tmp_path).library.compiled == 0, "they are kept in place of the old"
    assert caplog.text == ""


def a_file(folder: Path) -> None:
    folder.write_text("")


def a_link_to_nowhere(folder: Path) -> None:
    folder.symlink_to(folder.parent / "nowhere" / "at all")


@pytest.mark.parametrize("spoil", [a_file, a_link_to_nowhere])
def test_folder_that_cannot_be_written_costs_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None]
):
    spoil(tmp_path / "kernels")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert load(tmp_path / "kernels").library.compiled == 1
    assert "cannot be written" in caplog.text


def test_file_that_another_process_is_writing_is_left_to_it(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    load(tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    lock = FolderLock(path)
    lock.acquire()
    try:
        with caplog.at_level(logging.WARNING):
            load(tmp_path)
    finally:
        lock.release()
    assert "is not saved" in caplog.text
    assert files(tmp_path) == []


def test_library_that_keeps_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TensorRT, other than TensorRT-RTX, has nothing to finish on the GPU."""
    monkeypatch.delattr(fake_tensorrt.RuntimeConfig, "create_runtime_cache")
    load(tmp_path)
    assert files(tmp_path) == []


# The fake itself


def test_fake_has_nothing_that_the_real_library_lacks():
    try:
        real = importlib.import_module("tensorrt_rtx")
    except (ImportError, OSError):
        pytest.skip("tensorrt_rtx is not installed")
    pairs = {
        "ICudaEngine": fake_tensorrt.CudaEngine,
        "IExecutionContext": fake_tensorrt.ExecutionContext,
        "IRuntimeConfig": fake_tensorrt.RuntimeConfig,
        "IRuntimeCache": fake_tensorrt.RuntimeCache,
        "Runtime": fake_tensorrt.Runtime,
    }
    for name, mine in pairs.items():
        used = {n for n, value in vars(mine).items() if not n.startswith("_") and callable(value)}
        assert {n for n in used if not hasattr(getattr(real, name), n)} == set(), name
    assert hasattr(real.ICudaEngine, "device_memory_size_v2")
    enums = (fake_tensorrt.DataType, fake_tensorrt.TensorIOMode, fake_tensorrt.ExecutionContextAllocationStrategy)
    for mine in enums:
        assert {m.name for m in mine} <= set(getattr(real, mine.__name__).__members__)
    assert {m.name for m in fake_tensorrt.Severity} == set(real.ILogger.Severity.__members__)


def test_engine_type(backend: FakeBackend):
    assert isinstance(backend.load(packed(), SPEC), Engine)
