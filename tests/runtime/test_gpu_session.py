"""The tiny model on a fake GPU: the same bits as on the CPU, few waits, one allocation, and refusals before it."""

from __future__ import annotations

import gc
import hashlib
import logging
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL.Image import Image

from fastvar import Pipeline
from fastvar.core.dtypes import human_bytes
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.errors import BackendError, BundleError, DeviceMemoryError, NumericsError, PlanError
from fastvar.runtime import session as session_module
from fastvar.runtime.memory.fit import device_need
from fastvar.runtime.memory.layout import build_layout
from fastvar.runtime.session import Session
from tests.fakes.cuda import FakeDriver
from tests.fakes.tensorrt import FakeBackend, FakeTensorRT, fake_gpu_bundle
from tests.runtime.test_damaged_bundle import LAYER, flip, poison

PROMPT = "a red circle above a blue square"
SCALES = 3
WAIT, GRAPH = "cuStreamSynchronize", "cuGraphLaunch"
DRAWINGS = [
    {"seed": 7},
    {"seed": 8, "tau": 0.5, "top_p": 0.5},
    {"seed": 7, "guidance_scale": 1},
    {"seed": 7, "negative_prompt": "a white square"},
    {"seed": 2, "num_images": 2},
]


def scratch_of(engine: str) -> int:
    """Every engine another size, and some none."""
    return int.from_bytes(hashlib.sha256(engine.encode()).digest()[:2], "little") % 5 * 10_000


@pytest.fixture(scope="module")
def gpu_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return fake_gpu_bundle(tiny_bundle, tmp_path_factory.mktemp("bundles") / "gpu", scratch_of)


@pytest.fixture
def copied(gpu_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(gpu_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def cpu(tiny_bundle: Path) -> Pipeline:
    return Pipeline.load(tiny_bundle)


Load = Callable[..., tuple[Pipeline, FakeDriver]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a bundle as a user does, on a machine with a fake GPU; `library` is where its plans go."""

    def load(
        path: Path, driver: FakeDriver | None = None, library: FakeTensorRT | None = None, **options: object
    ) -> tuple[Pipeline, FakeDriver]:
        driver = driver or FakeDriver()

        def backend(name: str, *, threads: int | None, cache_folder: Path, target: str | None = None) -> FakeBackend:
            assert name == "tensorrt-rtx"
            return FakeBackend(driver, None, library)

        monkeypatch.setattr(session_module, "get_backend", backend)
        return Pipeline.load(path, **options), driver

    return load


def pixels(images: list[Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def needed(manifest: Manifest, offload: bool = False) -> int:
    layouts = [build_layout(manifest, s.rows, offload_text_encoder=offload) for s in manifest.sets]
    return device_need(layouts).total_bytes


# The same bits


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
def test_images_are_those_of_the_cpu(cpu: Pipeline, gpu_bundle: Path, load: Load, offload: bool):
    """All on one pipeline, so that with and without guidance share their memory in turn."""
    gpu, _ = load(gpu_bundle, offload_text_encoder=offload)
    for sampling_mode in (*DRAWINGS, DRAWINGS[0]):
        assert pixels(gpu(PROMPT, **sampling_mode).images) == pixels(cpu(PROMPT, **sampling_mode).images), sampling_mode


@pytest.mark.parametrize("sampling_mode", [{"seed": 7}, {"seed": 7, "guidance_scale": 1}], ids=["guided", "free"])
def test_keys_take_a_detour_to_the_same_image(
    cpu: Pipeline, tiny_bundle: Path, load: Load, tmp_path: Path, sampling_mode: dict[str, object]
):
    """As if the library wanted addresses that are multiples of more than a token's keys."""
    gpu, driver = load(fake_gpu_bundle(tiny_bundle, tmp_path / "bundle", scratch_of, alignment=2048))
    assert pixels(gpu(PROMPT, **sampling_mode).images) == pixels(cpu(PROMPT, **sampling_mode).images)
    assert driver.count["cuMemcpyDtoDAsync"] > 0


def test_launches_made_one_by_one_draw_the_same(cpu: Pipeline, gpu_bundle: Path, load: Load):
    gpu, driver = load(gpu_bundle, cuda_graphs=False)
    assert pixels(gpu(PROMPT, seed=7).images) == pixels(cpu(PROMPT, seed=7).images)
    assert driver.count[GRAPH] == driver.count["cuStreamBeginCapture"] == 0


def test_launches_that_cannot_be_recorded_say_how_to_do_without(gpu_bundle: Path, load: Load):
    driver = FakeDriver()
    driver.failing["cuStreamEndCapture"] = driver.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    gpu, _ = load(gpu_bundle, driver)
    with pytest.raises(BackendError, match="cannot be recorded as a CUDA graph: cuStreamEndCapture failed") as error:
        gpu(PROMPT)
    assert "--no-cuda-graphs" in error.value.fix


def test_prompts_do_not_leak_into_each_other(cpu: Pipeline, gpu_bundle: Path, load: Load):
    gpu, _ = load(gpu_bundle, offload_text_encoder=True)
    prompts = ["a large striped red circle above a small blue square on white", "a red circle"]
    assert pixels(gpu(prompts, seed=0).images) == pixels(cpu(prompts, seed=0).images)


@pytest.mark.parametrize("sampling_mode", [{"seed": 7}, {"seed": 7, "guidance_scale": 1}], ids=["guided", "free"])
def test_previews_are_those_of_the_cpu(cpu: Pipeline, gpu_bundle: Path, load: Load, sampling_mode: dict[str, object]):
    gpu, _ = load(gpu_bundle)
    found, expected = (pixels([e.preview() for e in pipe.stream(PROMPT, **sampling_mode)]) for pipe in (gpu, cpu))
    assert len(found) == SCALES
    assert found == expected


def test_abandoned_stream_leaves_nothing_behind(cpu: Pipeline, gpu_bundle: Path, load: Load):
    gpu, _ = load(gpu_bundle)
    stream = gpu.stream("a green triangle", seed=1)
    next(stream)
    stream.close()
    assert pixels(gpu(PROMPT, seed=7).images) == pixels(cpu(PROMPT, seed=7).images)


def test_threads_share_a_pipeline(cpu: Pipeline, gpu_bundle: Path, load: Load):
    gpu, driver = load(gpu_bundle)
    found: dict[int, list[bytes]] = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: pixels(gpu(PROMPT, seed=s).images)})) for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {seed: pixels(cpu(PROMPT, seed=seed).images) for seed in (1, 2)}
    assert {thread.ident for thread in threads} <= set(driver.contexts)


def test_timings_are_measured_on_the_device(gpu_bundle: Path, load: Load):
    gpu, _ = load(gpu_bundle)
    (timing,) = gpu(PROMPT).timings
    assert [s.index for s in timing.scales] == [0, 2, 6]
    assert min(timing.text_ms, timing.decode_ms, *(s.ms for s in timing.scales)) > 0


# Waits and launches


@pytest.fixture
def warm(gpu_bundle: Path, load: Load) -> tuple[Pipeline, FakeDriver]:
    """Both workspaces are made, and the list of calls is empty."""
    gpu, driver = load(gpu_bundle)
    for guidance_scale in (1, 3):
        gpu(PROMPT, guidance_scale=guidance_scale)
    driver.calls.clear()
    return gpu, driver


def test_every_scale_is_one_launch(warm: tuple[Pipeline, FakeDriver]):
    gpu, driver = warm
    gpu(PROMPT, negative_prompt="a white square")
    assert driver.count[GRAPH] == 1 + SCALES + 1, "the condition, every scale, the image decoder"
    assert driver.count["enqueue"] == 2, "the text encoder twice"
    assert driver.count["cuMemAlloc"] == driver.count["cuMemHostAlloc"] == driver.count["cuGraphInstantiate"] == 0


def test_nothing_waits_between_scales_when_nobody_listens(warm: tuple[Pipeline, FakeDriver]):
    gpu, driver = warm
    gpu(PROMPT)
    last_scale, decoder = [i for i, name in enumerate(driver.calls) if name == GRAPH][-2:]
    assert WAIT not in driver.calls[:last_scale]
    assert driver.calls[last_scale:decoder].count(WAIT) == SCALES, "the logits of every scale"
    assert driver.calls[decoder:].count(WAIT) == 1, "the image"


def test_with_a_listener_every_event_is_one_wait(warm: tuple[Pipeline, FakeDriver]):
    gpu, driver = warm
    waits: list[tuple[int, int]] = []
    gpu(PROMPT, callback_on_scale_end=lambda _: waits.append((driver.count[GRAPH], driver.count[WAIT])))
    assert waits == [(2, 1), (3, 2), (4, 3)]


def test_event_comes_when_its_scale_is_done(cpu: Pipeline, warm: tuple[Pipeline, FakeDriver]):
    gpu, _ = warm
    seen: list[bytes] = []
    gpu(PROMPT, seed=7, callback_on_scale_end=lambda event: seen.append(event.preview().tobytes()))
    assert seen == pixels([event.preview() for event in cpu.stream(PROMPT, seed=7)])


# Memory


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offloaded"])
def test_device_holds_exactly_what_was_announced(gpu_bundle: Path, load: Load, offload: bool):
    announced = needed(Bundle.open(gpu_bundle).manifest, offload)
    gpu, driver = load(gpu_bundle, FakeDriver(memory=announced), offload_text_encoder=offload)
    for guidance_scale in (1, 3):
        gpu(PROMPT, guidance_scale=guidance_scale)
        assert driver.allocated_bytes == announced
    assert driver.count["cuMemAlloc"] == 1


def test_offloading_takes_no_more(gpu_bundle: Path):
    manifest = Bundle.open(gpu_bundle).manifest
    assert needed(manifest, True) <= needed(manifest, False)


def test_all_is_freed_with_the_pipeline(gpu_bundle: Path, load: Load):
    gpu, driver = load(gpu_bundle)
    for guidance_scale in (1, 3):
        gpu(PROMPT, guidance_scale=guidance_scale)
    alive = driver.alive()
    gpu(PROMPT)
    assert driver.alive() == alive, "an image leaves nothing"
    assert alive["executables"] == 2 * (1 + SCALES + 1), "the condition, every scale, the image decoder"
    assert "graphs" not in alive
    del gpu
    gc.collect()
    assert driver.alive() == {}


def test_offloading_is_of_no_effect_on_the_cpu(cpu: Pipeline, tiny_bundle: Path):
    offloaded = Pipeline.load(tiny_bundle, offload_text_encoder=True)
    assert pixels(offloaded(PROMPT, seed=0).images) == pixels(cpu(PROMPT, seed=0).images)


def refused(load: Load, bundle: Path, free: int, **options: object) -> DeviceMemoryError:
    driver = FakeDriver(memory=free)
    with pytest.raises(DeviceMemoryError) as error:
        load(bundle, driver, **options)
    assert driver.count["cuMemAlloc"] == 0, "nothing is allocated"
    assert human_bytes(free) in error.value.problem
    return error.value


def test_one_byte_too_little_is_refused(gpu_bundle: Path, load: Load):
    announced = needed(Bundle.open(gpu_bundle).manifest)
    error = refused(load, gpu_bundle, announced - 1)
    assert f"needs {human_bytes(announced)}" in error.problem


@pytest.fixture(scope="module")
def roomy_scale(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text encoder's weights fit where the engines of the scales work, so offloading saves all of them."""
    return fake_gpu_bundle(
        tiny_bundle,
        tmp_path_factory.mktemp("bundles") / "roomy",
        lambda n: 4_000_000 if n.startswith("attn_mlp") else 0,
    )


def test_too_little_memory_names_the_way_that_fits(cpu: Pipeline, roomy_scale: Path, load: Load):
    manifest = Bundle.open(roomy_scale).manifest
    whole, offloaded = needed(manifest), needed(manifest, True)
    assert offloaded < whole
    error = refused(load, roomy_scale, offloaded)
    assert f"load with offload_text_encoder=True (--offload-text-encoder): {human_bytes(offloaded)}" in error.fix
    gpu, _ = load(roomy_scale, FakeDriver(memory=offloaded), offload_text_encoder=True)
    assert pixels(gpu(PROMPT, seed=0).images) == pixels(cpu(PROMPT, seed=0).images), "and it does fit"


def test_too_little_memory_names_all_ways_that_fit(tiny_bundle: Path, tmp_path: Path, load: Load):
    """Engines with guidance want far more scratch memory here than those without."""
    bundle = fake_gpu_bundle(tiny_bundle, tmp_path / "bundle", lambda n: 4_000_000 if "-r2" in n else 0)
    error = refused(load, bundle, needed(Bundle.open(bundle).manifest, True))
    assert error.fix.count(":") == 2
    for way in ("--offload-text-encoder", "--guidance off"):
        assert way in error.fix


def test_too_little_memory_for_any_way(gpu_bundle: Path, load: Load):
    for offload in (False, True):
        error = refused(load, gpu_bundle, 1000, offload_text_encoder=offload)
        assert re.match("no option of this model fits: ", error.fix)


def test_a_budget_is_held_to_the_byte(cpu: Pipeline, gpu_bundle: Path, load: Load):
    """With memory to spare on the GPU; in bytes or in words."""
    announced = needed(Bundle.open(gpu_bundle).manifest)
    gpu, _ = load(gpu_bundle, memory_budget=announced)
    assert pixels(gpu(PROMPT, seed=0).images) == pixels(cpu(PROMPT, seed=0).images)
    driver = FakeDriver()
    with pytest.raises(DeviceMemoryError, match="are its budget"):
        load(gpu_bundle, driver, memory_budget=announced - 1)
    assert driver.count["cuMemAlloc"] == 0
    with pytest.raises(DeviceMemoryError):
        load(gpu_bundle, memory_budget="1KiB")
    with pytest.raises(PlanError, match="not understood"):
        load(gpu_bundle, memory_budget="lots")


def test_the_tighter_of_budget_and_free_memory_counts(gpu_bundle: Path, load: Load):
    announced = needed(Bundle.open(gpu_bundle).manifest)
    assert "are free" in refused(load, gpu_bundle, announced - 2, memory_budget=announced - 1).problem


def test_a_budget_counts_on_the_cpu_too(tiny_bundle: Path):
    with pytest.raises(
        DeviceMemoryError, match=r"weights, .* for drawing, .* for the library\), 16.0 MiB are its budget"
    ):
        Pipeline.load(tiny_bundle, memory_budget="16MiB")
    assert Pipeline.load(tiny_bundle, memory_budget="2GiB")(PROMPT).images


def test_way_that_is_taken_already_is_not_named(roomy_scale: Path, load: Load):
    offloaded = needed(Bundle.open(roomy_scale).manifest, True)
    assert "offload" not in refused(load, roomy_scale, offloaded - 1, offload_text_encoder=True).fix


# Scratch memory beyond what was announced


def test_engine_that_wants_more_scratch_gets_it_with_a_warning(
    cpu: Pipeline, tiny_bundle: Path, tmp_path: Path, load: Load, caplog: pytest.LogCaptureFixture
):
    bundle = fake_gpu_bundle(
        tiny_bundle, tmp_path / "bundle", 1000, lambda n: 70_000 if n.startswith("attn_mlp") else 1000
    )
    gpu, driver = load(bundle)
    with caplog.at_level(logging.WARNING):
        assert pixels(gpu(PROMPT, seed=0).images) == pixels(cpu(PROMPT, seed=0).images)
    assert caplog.text.count("needs 70000 bytes of scratch memory, more than was planned") == 1
    assert driver.allocated_bytes == needed(Bundle.open(bundle).manifest) + 70_000


def test_engines_that_want_more_and_more_scratch_all_keep_theirs(
    cpu: Pipeline, tiny_bundle: Path, tmp_path: Path, load: Load
):
    """Each finds the last one's too small; what was recorded before must not work in memory that is freed."""
    manifest = Bundle.open(tiny_bundle).manifest
    order = list(dict.fromkeys(call.engine for s in (2, 1) for call in build_layout(manifest, s).calls()))
    bundle = fake_gpu_bundle(tiny_bundle, tmp_path / "bundle", 0, lambda n: 1000 * (1 + order.index(n)))
    gpu, _ = load(bundle)
    for guidance_scale in (3, 1, 3):
        drawn = gpu(PROMPT, guidance_scale=guidance_scale, seed=0).images
        assert pixels(drawn) == pixels(cpu(PROMPT, guidance_scale=guidance_scale, seed=0).images)


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


def test_bundle_without_guidance_takes_less(gpu_bundle: Path):
    bundle = Bundle.open(gpu_bundle)
    manifest = replace(bundle.manifest, sets=tuple(s for s in bundle.manifest.sets if s.rows == 1))
    backend = FakeBackend()
    session = Session(replace(bundle, manifest=manifest), backend=backend)
    session.workspace(1)
    assert backend.driver.allocated_bytes == needed(manifest) < needed(bundle.manifest)
