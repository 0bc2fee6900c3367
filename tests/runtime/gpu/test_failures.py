"""On a fake GPU: damaged files, values that are no numbers, the wrong GPU; and the kernels beside the bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastvar import Pipeline
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import BackendError, BundleError, NumericsError
from fastvar.runtime.session import Session
from tests.fakes.cuda import FakeDriver
from tests.fakes.tensorrt import FakeBackend, FakeTensorRT
from tests.runtime.gpu.drawing import PROMPT, Load, pixels
from tests.runtime.test_damaged_bundle import LAYER, flip, poison

# Damage


@pytest.mark.parametrize("listens", [False, True])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        (LAYER.format(1) + "ffn.fc2.weight", "scale 0 (1x1), layer 1:"),
        (LAYER.format(1) + "ca.mat_kv.weight", "the condition of layer 1:"),
        ("transformer.head.weight", "scale 0 (1x1), the head:"),
        ("transformer.text_proj_for_ca.0.weight", "the condition:"),
        ("text_encoder.encoder.final_layer_norm.weight", "the text features:"),
        ("image_tokenizer.decoder.conv_out.conv.bias", "the image decoder:"),
    ],
)
def test_nan_is_named_by_scale_and_layer(copied: Path, load: Load, name: str, where: str, listens: bool):
    poison(copied, name)
    gpu, _ = load(copied, offload_text_encoder=True)
    with pytest.raises(NumericsError) as error:
        gpu(PROMPT, callback_on_scale_end=(lambda _: None) if listens else None)
    assert error.value.problem.startswith(where)


@pytest.mark.parametrize("listens", [False, True])
def test_nan_that_only_a_later_scale_meets(copied: Path, load: Load, listens: bool):
    """Found though all scales have run by then; see the same test on the CPU."""
    poison(copied, "transformer.lvl_embed.weight", row=6)
    gpu, _ = load(copied)
    with pytest.raises(NumericsError, match=r"^scale 2 \(4x4\), the tokens of the next scale:"):
        gpu(PROMPT, callback_on_scale_end=(lambda _: None) if listens else None)


def test_flipped_byte_is_found_before_the_library_sees_it(copied: Path, load: Load):
    driver = FakeDriver()
    library = FakeTensorRT(driver)
    flip(next(copied.glob("engines/attn_mlp-*")))
    with pytest.raises(BundleError, match="is damaged"):
        load(copied, driver, library)
    assert library.plans == []
    assert driver.calls == []


def test_bytes_flipped_after_loading_never_reach_the_library(cpu: Pipeline, copied: Path, load: Load):
    gpu, _ = load(copied)
    for path in copied.glob("engines/*"):
        flip(path)
    assert pixels(gpu(PROMPT, seed=7).images) == pixels(cpu(PROMPT, seed=7).images)


def test_kernels_do_not_go_into_the_bundle_that_took_the_place(copied: Path, gpu_bundle: Path, load: Load):
    gpu, _ = load(copied)
    shutil.rmtree(copied)
    gpu(PROMPT)
    assert not copied.exists(), "nor does a folder come back that was removed"
    shutil.copytree(gpu_bundle, copied)
    gpu(PROMPT, guidance_scale=1)
    assert not (copied / "kernels").exists()


def test_bundle_for_another_gpu_is_refused(gpu_bundle: Path, load: Load):
    gpu, _ = load(gpu_bundle, FakeDriver(capability=(8, 9), name="NVIDIA L4"))
    with pytest.raises(BackendError, match=r"was built for sm86, this GPU is sm89 \(NVIDIA L4\)"):
        gpu(PROMPT)


def test_failure_while_drawing_leaves_the_pipeline_usable(cpu: Pipeline, gpu_bundle: Path, load: Load):
    driver = FakeDriver()
    library = FakeTensorRT(driver)
    gpu, _ = load(gpu_bundle, driver, library)
    for _ in range(2):
        library.refuses = "not today"
        with pytest.raises(BackendError, match="not today"):
            gpu(PROMPT)
    library.refuses = ""
    assert pixels(gpu(PROMPT, seed=0).images) == pixels(cpu(PROMPT, seed=0).images)


# Kernels


def test_kernels_are_kept_in_the_bundle(copied: Path):
    for first in (True, False):
        bundle = Bundle.open(copied)
        assert bundle.kernel_folder == copied / "kernels"
        backend = FakeBackend(cache_folder=bundle.kernel_folder)
        session = Session(bundle, backend=backend)
        session.workspace(2)
        session.save_compiled_kernels()
        assert (backend.library.compiled > 0) is first
    Bundle.open(copied, verify="all")
