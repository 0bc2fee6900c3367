"""What is measured, what it is taken for, and what is refused before anything runs."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastvar.core.plan import make_plan
from fastvar.core.policy import DENSE
from fastvar.engines.bundle.bundle import Bundle
from fastvar.errors import BundleError, DeviceMemoryError, InputError
from fastvar.families.infinity import TRANSFORMERS
from fastvar.families.infinity_presets import schedule_for
from fastvar.profiling import memory_run as memory_module
from fastvar.profiling import nvml_probe
from fastvar.profiling.estimates.costs import add, engine_costs
from fastvar.profiling.memory_run import device_kind, memory_run, memory_run_apart
from fastvar.profiling.nvml_probe import NvmlProbe
from fastvar.profiling.profile import LAUNCH_WARM_UP, check_request, labels_of, measure
from fastvar.profiling.profiled_bundle import ProfiledBundle
from fastvar.profiling.records import MemoryEvent, Profile, Request, spread
from fastvar.profiling.rows import engine_rows
from fastvar.runtime.output import ImageTimings, ScaleTiming
from tests.fakes.nvml import FakeNvml
from tests.fakes.tensorrt import FakeBackend, fake_gpu_bundle

REQUEST = Request("a red circle", seed=3, runs=2, warm_up=1)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def textless(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle as if it had been built without a text encoder."""
    path = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundles") / "textless")
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["checksum"]  # of a manifest that nobody edited
    (path / "manifest.json").write_text(json.dumps({**manifest, "text_encoder": "", "text_tokenizer": None}))
    return Bundle.open(path)


# What comes out


def test_every_stage_is_there_with_its_tokens(measured: Profile):
    rows = [(row.name, row.size, row.tokens, row.kept) for row in measured.subject.stages]
    scales = [("scale 0", (1, 1), 1, 1), ("scale 2", (4, 4), 16, 16), ("scale 6", (16, 16), 256, 128)]
    assert rows == [("text", None, None, None), *scales, ("decoder", None, None, None)]


def test_rows_add_up_to_the_image(measured: Profile, bundle: Bundle):
    costs = engine_costs(bundle.manifest, 2)
    for found in measured.bundles:
        for rows in (found.stages, found.engines):
            assert add(row.cost for row in rows) == costs.total
            assert sum(row.share for row in rows) == pytest.approx(1)
            assert sum(row.launches for row in rows) == len(costs.calls) == len(found.launches)
        assert found.kv_cache_bytes == costs.kv_cache_bytes
        assert found.totals["image"].median >= found.totals["scales"].median > 0
        assert found.totals["image"].p95 >= found.totals["image"].median


def test_engines_of_pruned_layers_are_told_from_the_others(measured: Profile):
    rows = [(r.name, r.kind, r.kept, r.launches) for r in measured.subject.engines if r.scale == 6]
    assert rows == [
        ("qkv-16x16-k256-r2", "qkv", 256, 1),
        ("attn_mlp-16x16-k256-s273-r2", "attn_mlp", 256, 1),
        ("qkv-16x16-k128-r2", "qkv", 128, 1),
        ("attn_mlp-16x16-k128-s145-r2", "attn_mlp", 128, 1),
        ("sampling_head-16x16-end-of-16x16-r2", "sampling_head", 256, 1),
    ]


def test_memory_goes_from_stage_to_stage(measured: Profile):
    for found in measured.bundles:
        run = found.memory
        assert run.loading.after_bytes == found.stages[0].memory_before_bytes
        for one, following in itertools.pairwise(found.stages):
            assert one.memory_after_bytes == following.memory_before_bytes
        events = (run.loading, *run.launches)
        for one, following in itertools.pairwise(events):
            assert one.start_s < one.end_s == following.start_s
        assert run.recording.peak_bytes >= max(event.after_bytes for event in events)
        assert run.recording.over_budget is False


def test_each_bundle_is_loaded_into_a_process_of_its_own(measured: Profile):
    """This one has torch in it, and takes hundreds of megabytes more."""
    with open("/proc/self/status") as file:
        here = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS"))
    for found in measured.bundles:
        assert found.memory.recording.before_bytes < here / 2


def test_settings_say_what_was_drawn(measured: Profile):
    assert measured.settings["seed"] == 3
    assert (measured.settings["runs"], measured.settings["warm_up"]) == (2, 1)
    assert measured.subject.facts["text"] == "prompt"
    assert measured.environment["backend"].startswith("onnxruntime ")
    other, subject = measured.bundles
    assert measured.speedup("image") == other.totals["image"].median / subject.totals["image"].median


def test_kept_tokens_are_those_of_the_image(measured: Profile):
    """Three sub-layers of one pruned layer keep 128 of 256 tokens each."""
    (found,) = measured.subject.kept
    counts = np.array(found.counts)
    assert (found.scale, found.size, found.kept, found.selections) == (6, (16, 16), 128, 3)
    assert counts.shape == (16, 16)
    assert counts.sum() == 3 * 128
    assert counts.max() <= 3


def test_kept_tokens_are_counted_for_the_conditional_row():
    """Indices into [L * R]: token * 2 + row."""
    subject = object.__new__(ProfiledBundle)
    given = {"a": np.array([5 * 2, 5 * 2 + 1, 3 * 2 + 1, 0]), "b": np.array([5 * 2, 4 * 2 + 1])}
    subject.workspace = SimpleNamespace(read_view=given.get)
    step = SimpleNamespace(index=4, size=(2, 3), tokens=6, kept=2)
    found = subject._kept_map(SimpleNamespace(step=step, rows=2, kept={0: {"sa": "a", "ca": "b"}}))
    assert found.counts == ((1, 0, 0), (0, 0, 2))
    assert found.selections == 2


def test_the_image_is_the_pipelines(tiny_bundle: Path, bundle: Bundle):
    import io

    from PIL import Image

    from fastvar import Pipeline

    subject = ProfiledBundle(bundle, REQUEST)
    subject.timed_image()
    whole = Image.open(io.BytesIO(subject.image_png())).tobytes()
    assert whole == Pipeline.load(tiny_bundle)("a red circle", seed=3).images[0].tobytes()
    list(subject.launches())
    assert Image.open(io.BytesIO(subject.image_png())).tobytes() == whole, "launch by launch"
    list(subject.kept_maps())
    assert Image.open(io.BytesIO(subject.image_png())).tobytes() == whole


def test_launches_are_those_whose_cost_is_counted(bundle: Bundle):
    profiled = ProfiledBundle(bundle, REQUEST)
    launches = [(call.engine, call.layer, step and step.step.index) for step, call, _ in profiled.launches()]
    assert launches == [(call.engine, call.layer, call.scale) for call in engine_costs(bundle.manifest, 2).calls]


# How it is measured


class FakeSubject:
    """Writes down its turns; its first images and its first launches take an hour."""

    def __init__(self, name: str, log: list[str], warm_up: int) -> None:
        self.name, self.log, self.cold, self.cold_launches = name, log, warm_up, LAUNCH_WARM_UP

    def timed_image(self) -> ImageTimings:
        self.log.append(self.name)
        self.cold -= 1
        return ImageTimings(1.0, (ScaleTiming(0, (1, 1), 1, 1, 3.6e6 if self.cold >= 0 else 2.0),), 3.0)

    def launches(self) -> Iterator[tuple[None, None, float]]:
        self.log.append(self.name.upper())
        self.cold_launches -= 1
        yield None, None, 3.6e6 if self.cold_launches >= 0 else 5.0


def test_warm_up_is_excluded_and_runs_alternate():
    log: list[str] = []
    told: list[tuple[str, int, int]] = []
    subjects = [FakeSubject(name, log, warm_up=2) for name in "ab"]
    found = measure(subjects, Request(runs=3, warm_up=2), lambda *progress: told.append(progress))
    assert "".join(log) == "ab" * 5 + "AB" * 4
    for one in found:
        assert [image.total_ms for image in one.images] == [6.0] * 3
        assert one.launches == [[5.0]] * 3
    assert [done for _, done, _ in told] == list(range(9))
    assert {total for *_, total in told} == {9}


def test_layers_of_an_engine_are_added_up_before_the_median(bundle: Bundle):
    costs = engine_costs(bundle.manifest, 2)
    runs = [[float(run)] * len(costs.calls) for run in (1, 2, 9)]
    events = [MemoryEvent("", None, 0, 1, i, i + 1) for i in range(len(costs.calls))]
    rows = engine_rows(bundle.manifest, costs, runs, events)
    text_kv = next(row for row in rows if row.kind == "layer condition")
    assert (text_kv.launches, text_kv.ms.median) == (2, 4.0)
    assert (text_kv.memory_before_bytes, text_kv.memory_after_bytes) == (2, 4)


def test_spread():
    found = spread([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found.median, found.p95) == (3.0, pytest.approx(4.8))


# Without a text encoder, and on a GPU


def test_a_bundle_without_a_text_encoder_draws_from_random_text(textless: Bundle):
    request = Request(runs=1, warm_up=1)
    check_request([textless], request)
    subject = ProfiledBundle(textless, request)
    assert subject.prompt is None
    launches = [call.engine for _, call, _ in subject.launches()]
    assert launches == [call.engine for call in engine_costs(textless.manifest, 2).calls]
    assert subject.timed_image().total_ms > 0
    run = memory_run(textless, request)
    assert [event.name for event in run.launches] == launches
    with pytest.raises(InputError, match="no text encoder"):
        check_request([textless], REQUEST)


def test_on_a_gpu(tiny_bundle: Path, bundle: Bundle, tmp_path: Path):
    """A fake one: the same image, launch by launch and recorded, and memory as NVML tells it."""
    gpu = Bundle.open(fake_gpu_bundle(tiny_bundle, tmp_path / "gpu"))
    assert (device_kind(gpu), device_kind(bundle)) == ("cuda", "cpu")
    nvml = FakeNvml(used=(1000, 5000, 4000))
    nvml.compute = list
    run = memory_run(gpu, REQUEST, backend=FakeBackend(), probe=NvmlProbe(nvml=nvml))
    assert (run.recording.peak_bytes, run.recording.peak.source) == (4000, nvml_probe.CHANGE)
    assert len(run.launches) == len(engine_costs(gpu.manifest, 2).calls)
    subject, expected = ProfiledBundle(gpu, REQUEST, FakeBackend()), ProfiledBundle(bundle, REQUEST)
    (found,) = measure([subject], REQUEST, lambda *_: None)
    assert len(found.images) == len(found.launches) == 2
    assert list(subject.kept_maps()) == list(expected.kept_maps())
    assert subject.image_png() == expected.image_png()


# What is refused


def test_what_stops_a_memory_run_is_told_as_it_is(bundle: Bundle, tmp_path: Path):
    with pytest.raises(BundleError, match="is not a bundle"):
        memory_run_apart(tmp_path, REQUEST)


def test_a_memory_run_that_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory_module, "_open_and_run", eval)  # what a process can be sent, and calls
    with pytest.raises(DeviceMemoryError, match="stopped from outside"):
        memory_run_apart("__import__('os')._exit(9)", {})


def test_bundles_of_another_size_or_model_are_not_compared(bundle: Bundle):
    m = bundle.manifest
    larger = replace(m, plan=make_plan(schedule_for((1024, 1024)), DENSE, m.plan.depth))
    wider = replace(m, transformer=TRANSFORMERS["infinity_layer12"])
    dense = replace(m, plan=make_plan(m.plan.schedule, DENSE, m.plan.depth))
    with pytest.raises(InputError, match="other sizes: tiny at 256x256, and tiny at 1024x1024"):
        check_request([bundle, replace(bundle, manifest=larger)], REQUEST)
    with pytest.raises(InputError, match="other models"):
        check_request([bundle, replace(bundle, manifest=wider)], REQUEST)
    check_request([bundle, replace(bundle, manifest=dense)], REQUEST)


@pytest.mark.parametrize("request_", [Request(runs=0), Request(warm_up=0)])
def test_no_runs_and_no_warm_up(bundle: Bundle, request_: Request):
    with pytest.raises(InputError, match="at least 1 of each"):
        check_request([bundle], request_)


def test_guidance_that_a_bundle_has_no_engines_for(bundle: Bundle):
    guided = replace(bundle, manifest=replace(bundle.manifest, sets=bundle.manifest.sets[:1]))
    (rows,) = (s.rows for s in guided.manifest.sets)
    with pytest.raises(BundleError, match="no engines"):
        check_request([guided], Request(guidance_scale=1 if rows == 2 else 3))


def test_labels(bundle: Bundle):
    def at(path: str, policy: str) -> Bundle:
        plan = replace(bundle.manifest.plan, policy=replace(bundle.manifest.plan.policy, name=policy))
        return replace(bundle, path=Path(path), manifest=replace(bundle.manifest, plan=plan))

    assert labels_of([at("x/pruned", "fastvar")]) == ["pruned"]
    assert labels_of([at("x/a", "p"), at("x/b", "p")]) == ["a", "b"]
    assert labels_of([at("x/a", "p"), at("y/a", "q")]) == ["p", "q"]
    assert labels_of([at("x/a", "p"), at("y/a", "p")]) == ["a 1", "a 2"]
