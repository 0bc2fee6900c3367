"""What only a GPU can show: real driver, real engines. `make gpu` runs these; elsewhere they skip and say why."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

import fastvar
from fastvar import Pipeline
from fastvar.core.tensors import TensorRef
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.tensorrt.backend import ANY, TensorRTRTXBackend
from fastvar.engines.tensorrt.cuda_device import CudaDevice
from fastvar.errors import BackendError, BuildError

pytestmark = pytest.mark.gpu
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


@pytest.fixture(scope="module")
def rtx_bundle(
    tiny_checkpoint, tiny_policy: Path, engine_cache: Path, device: CudaDevice, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    pytest.importorskip("tensorrt_rtx")
    known = TensorRTRTXBackend().known_targets()
    target = device.gpu_facts().capability if device.gpu_facts().capability in known else ANY
    out = tmp_path_factory.mktemp("gpu") / "tiny"
    options = {"backend": "tensorrt-rtx", "target": target, "precision": "fp16", "guidance": "on"}
    fastvar.build(tiny_checkpoint, size="256x256", policy=str(tiny_policy), out=out, cache=engine_cache, **options)
    return out


@pytest.fixture(scope="module")
def program_bundle(
    tiny_checkpoint, tiny_policy: Path, engine_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Engines of AOTInductor, which need torch built for CUDA."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    out = tmp_path_factory.mktemp("gpu") / "programs"
    options = {"backend": "aotinductor", "target": "cuda", "guidance": "on"}
    fastvar.build(tiny_checkpoint, size="256x256", policy=str(tiny_policy), out=out, cache=engine_cache, **options)
    return out


def test_bytes_come_back_as_they_went(device: CudaDevice):
    sent = np.random.default_rng(0).integers(0, 255, (40 << 20) + 13, dtype=np.uint8)  # more than the staging ring
    memory = device.allocate(sent.size)
    target = TensorRef(memory.address, "uint8", sent.shape)
    assert not device.read(target).any(), "memory is zeroed"
    device.write(target, sent)
    expected = sent.copy()
    sent[:] = 0  # allowed as soon as write has returned
    np.testing.assert_array_equal(device.read(target), expected)


def test_memory_is_given_back(device: CudaDevice):
    before = device.free_bytes()
    memory = device.allocate(256 << 20)
    assert device.free_bytes() <= before - (256 << 20)
    del memory
    gc.collect()
    assert device.free_bytes() >= before - (1 << 20)


@pytest.mark.parametrize(("engines", "tolerance"), [("rtx_bundle", 0.02), ("program_bundle", 0.1)])  # fp16, bf16
def test_engines_draw_what_onnxruntime_draws(
    engines: str, tolerance: float, tiny_bundle: Path, request: pytest.FixtureRequest
):
    """Bits are forced, so that a rounding cannot send the two different ways."""
    from benchmarks.builder import GUIDED
    from benchmarks.contenders import EngineContender
    from benchmarks.gpu.drawing import relative_error
    from benchmarks.timing import forced_logits
    from fastvar.profiling.profiled_bundle import random_features

    bundles = [Bundle.open(path) for path in (request.getfixturevalue(engines), tiny_bundle)]
    features = random_features(bundles[0].manifest)
    found, expected = (EngineContender(bundle, features, GUIDED) for bundle in bundles)
    for scale in zip(forced_logits(found), forced_logits(expected), strict=True):
        assert relative_error(*scale) < tolerance
    assert relative_error(found.workspace.decode(), expected.workspace.decode()) < tolerance


def test_same_seed_same_image(rtx_bundle: Path):
    pipe = Pipeline.load(rtx_bundle)
    first, second = (np.asarray(pipe(PROMPT, seed=3).images[0]) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    other = Pipeline.load(rtx_bundle, offload_text_encoder=True)
    np.testing.assert_array_equal(np.asarray(other(PROMPT, seed=3).images[0]), first)


def test_recorded_programs_draw_what_single_launches_draw(program_bundle: Path):
    recorded, single = (Pipeline.load(program_bundle, cuda_graphs=graphs) for graphs in (True, False))
    first, again, other = (np.asarray(pipe(PROMPT, seed=3).images[0]) for pipe in (recorded, recorded, single))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, other)


def test_streaming_draws_the_same_scales(rtx_bundle: Path):
    pipe = Pipeline.load(rtx_bundle)
    events = [event.index for event in pipe.stream(PROMPT, seed=3)]
    assert events == [step.index for step in pipe.manifest.plan.steps]


def test_kernels_are_kept_beside_the_engines(rtx_bundle: Path):
    Pipeline.load(rtx_bundle)(PROMPT)
    assert list((rtx_bundle / "kernels").glob("tensorrt-rtx-*.kernels"))


def test_engines_for_another_gpu_are_refused(
    tiny_checkpoint, tiny_policy: Path, engine_cache: Path, device: CudaDevice, tmp_path: Path
):
    pytest.importorskip("tensorrt_rtx")
    other = "sm120" if device.gpu_facts().capability != "sm120" else "sm86"
    options = {"backend": "tensorrt-rtx", "target": other, "precision": "fp16", "guidance": "on"}
    fastvar.build(
        tiny_checkpoint, size="256x256", policy=str(tiny_policy), out=tmp_path / "b", cache=engine_cache, **options
    )
    with pytest.raises(BackendError, match=f"built for {other}"):
        Pipeline.load(tmp_path / "b")(PROMPT)


def test_current_is_this_gpu(device: CudaDevice):
    pytest.importorskip("tensorrt_rtx")
    from fastvar.core.precision import Precision

    backend = TensorRTRTXBackend()
    if device.gpu_facts().capability in backend.known_targets():
        assert backend.resolve_target("current", Precision("float16")) == device.gpu_facts().capability
    else:
        with pytest.raises(BuildError, match=ANY):
            backend.resolve_target("current", Precision("float16"))
