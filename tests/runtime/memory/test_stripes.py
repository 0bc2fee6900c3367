"""A tiled decoder: its layout played, and its bundle against the one that decodes the whole image at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.core.dtypes import size_bytes
from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.core.policy import DENSE
from fastvar.core.schedule import ScaleSchedule
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import EDGE_INSIDE, EDGE_OUTSIDE, Manifest
from fastvar.engines.spec import EngineReport
from fastvar.export.build import build_bundle
from fastvar.export.checkpoints.random_weights import random_checkpoint_for
from fastvar.export.options import BuildOptions
from fastvar.families.infinity import ImageTokenizerConfig
from fastvar.runtime.memory.layout import EngineCall, Layout, WeightView, build_layout
from fastvar.runtime.memory.stripes import BUFFER, HALO, WITH_HALO, Rows, over
from fastvar.runtime.preview import to_image
from fastvar.runtime.requests.settings import SamplingSettings
from fastvar.runtime.session import Session
from fastvar.runtime.workspace import Workspace
from tests.conftest import TOKENIZER
from tests.fakes.cuda import FakeDriver
from tests.fakes.tensorrt import FakeBackend, fake_gpu_bundle
from tests.models import tiny_models as tiny
from tests.models.described_engines import manifest_for, model
from tests.runtime.memory.play import Play, extent, views
from tests.runtime.memory.test_layout import border

Label = tuple[str, int]
Writer = tuple[Label, str]  # a launch, and its tensor

# Channels that stay, shrink and grow from one level to the next.
SMALL = ImageTokenizerConfig(bits=8, base_channels=24, channel_multipliers=(1, 2, 1, 4), residual_blocks=1)


def plan_for(height: int, width: int) -> GenerationPlan:
    return make_plan(ScaleSchedule(((1, 1), (height, width)), (height, width)), DENSE, 1)


def laid_out(height: int, width: int, tile: int, images: ImageTokenizerConfig = SMALL) -> tuple[Manifest, Layout]:
    manifest = manifest_for(plan_for(height, width), model(1), images=images, decoder_tile=tile)
    return manifest, build_layout(manifest, 1)


tilings = st.builds(laid_out, st.integers(1, 7), st.integers(1, 2), st.integers(1, 8))


@settings(max_examples=15, deadline=None)
@given(tilings)
def test_every_stripe_reads_what_the_stage_before_it_wrote(tiling: tuple[Manifest, Layout]):
    """Rows next to it included, and no others; residuals come from before the block."""
    manifest, layout = tiling
    play = Play(manifest, layout)
    writers: dict[str, list[Writer]] = {}  # of every row, by activation
    previous = [("decode", 0)]
    for labels, calls in stages(manifest, layout):
        for name in {"stripe", "inner_stripe", "residual"} & calls[0].tensors.keys():
            rows, first = writers["inner" if name == "inner_stripe" else "stream"], 0
            for label, call in zip(labels, calls, strict=True):
                view = views(call)[name]
                halo = HALO if name in WITH_HALO else 0
                stop = first + view.shape[0] - 2 * halo
                wanted = rows[max(first - halo, 0) : stop + halo]
                assert play.reads[label, name] == runs(wanted, view.size // view.shape[0])
                first = stop
            assert first == len(rows)
        if "statistics" in calls[0].tensors:
            for label in labels:
                assert [(who, what) for who, what, _ in play.reads[label, "statistics"]] == [
                    (who, "statistics_out") for who in previous
                ]
        for name in {"stripe_out", "inner_stripe_out"} & calls[0].tensors.keys():
            heights = [views(call)[name].shape[0] for call in calls]
            made = [(label, name) for label, height in zip(labels, heights, strict=True) for _ in range(height)]
            writers["inner" if name == "inner_stripe_out" else "stream"] = made
        previous = labels
    assert [(who, what) for who, what, _ in play.reads["user", "image"]] == [(label, "image") for label in previous]


def stages(manifest: Manifest, layout: Layout) -> Iterator[tuple[list[Label], list[EngineCall]]]:
    """The launches of every stage with their labels, stripes from top to bottom."""
    numbered = [(("decode", number), call) for number, call in enumerate(layout.decode)]
    ends = range(1, len(numbered) + 1, manifest.tiles.stripes)
    for group in (numbered[:1], *(numbered[a:b] for a, b in itertools.pairwise(ends))):
        below = group[0][1].tensors.get("below")
        if isinstance(below, WeightView) and below.name == EDGE_OUTSIDE:
            group = group[::-1]
        yield [label for label, _ in group], [call for _, call in group]


def runs(rows: Sequence[Writer], row_bytes: int) -> list[tuple[Label, str, int]]:
    return [(*writer, len(list(same)) * row_bytes) for writer, same in itertools.groupby(rows)]


@settings(max_examples=15, deadline=None)
@given(tilings)
def test_no_stripe_writes_where_it_reads(tiling: tuple[Manifest, Layout]):
    """Not even the spare rows that it is bound to."""
    manifest, layout = tiling
    for call in layout.decode:
        bound = views(call)
        for output, other in itertools.product([t.name for t in manifest.engines[call.engine].outputs], bound):
            a, b = extent(layout, bound[output]), extent(layout, bound[other])
            assert output == other or a.stop <= b.start or b.stop <= a.start, f"{call.engine}: {output}, {other}"


@settings(max_examples=15, deadline=None)
@given(tilings)
def test_ends_of_the_image_are_told(tiling: tuple[Manifest, Layout]):
    manifest, layout = tiling
    for _, calls in list(stages(manifest, layout))[1:]:
        for number, call in enumerate(calls):
            ends = {"above": number == 0, "below": number == len(calls) - 1}
            for name, outside in ends.items():
                assert call.tensors[name].name == (EDGE_OUTSIDE if outside else EDGE_INSIDE)


counts = st.lists(st.integers(1, 4), min_size=1, max_size=6)


@given(counts, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from((0, HALO)), st.integers(0, 40))
def test_what_is_written_over_a_source_spares_what_is_still_to_be_read(
    heights: list[int], growth: int, read_bytes: int, written_bytes: int, halo: int, start: int
):
    ends = [0, *itertools.accumulate(heights)]
    read = list(itertools.pairwise(ends))
    written = [(first * growth, stop * growth) for first, stop in read]
    source = Rows(start, read_bytes, ends[-1])
    placed = over(source, read, Rows(0, written_bytes, ends[-1] * growth), written, halo)
    target, numbers = placed.rows, range(len(read))
    taken: set[int] = set()
    for number in reversed(numbers) if placed.upwards else numbers:
        first, stop = read[number]
        reads = set(range(source.at(first - halo), source.at(stop + halo)))
        taken |= set(range(*(target.at(row) for row in written[number])))
        assert not reads & taken
    assert target.start >= 0
    assert len(taken) == ends[-1] * growth * written_bytes


def test_decoding_in_stripes_takes_less_memory_than_one_convolution_of_a_whole_image():
    """The published decoder at 2048x2048: its largest activation, twice, is the least that a whole one needs."""
    published = ImageTokenizerConfig(bits=8)
    whole = (256, 2048, 2048)  # channels of the last upsampling, and pixels
    _, layout = laid_out(128, 128, 8, published)
    activation = size_bytes("float32", whole)
    assert activation < layout.buffers[BUFFER].size < 1.1 * activation
    untiled = manifest_for(plan_for(128, 128), model(1), images=published)
    report = EngineReport(2 * activation)
    engines = {**untiled.engines, untiled.decoder: replace(untiled.engines[untiled.decoder], report=report)}
    assert layout.arena_bytes < 0.6 * build_layout(replace(untiled, engines=engines), 1).arena_bytes


# A bundle, end to end

IMAGES = ImageTokenizerConfig(bits=6, base_channels=32, channel_multipliers=(1, 1, 1, 1, 2), residual_blocks=0)
TILE = 2  # of 6 latent rows: stripes at the top, in the middle and at the bottom


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, engine_cache: Path) -> tuple[Bundle, Bundle]:
    """The same model with its decoder whole, and in stripes; of the scales before it the fewest."""
    made = random_checkpoint_for(tiny.CONFIG, IMAGES, name="tiny", tokenizer_file=TOKENIZER)
    folder = tmp_path_factory.mktemp("tiled")
    for name, tile in (("whole", None), ("tiled", TILE)):
        build_bundle(
            made,
            tiny.first_and_last(),
            folder / name,
            BuildOptions(guidance="on", decoder_tile=tile),
            cache=engine_cache,
        )
    return Bundle.open(folder / "whole"), Bundle.open(folder / "tiled")


def drawn(workspace: Workspace) -> np.ndarray:
    features = tiny.text()[0].numpy()
    workspace.set_features(features[0], features[1], (5, 8))
    for _ in workspace.run_scales(lambda i, shape: tiny.noise(i, shape).numpy(), SamplingSettings(3.0, 0.7, 0.9)):
        pass
    return workspace.decode().copy()


def test_a_tiled_bundle_draws_the_same_image(bundles: tuple[Bundle, Bundle]):
    whole, tiled = (drawn(Session(bundle).workspace(2)) for bundle in bundles)
    assert whole.shape == tiled.shape == (3, 96, 128)
    assert whole.std() > 0.05
    np.testing.assert_allclose(tiled, whole, atol=1e-4, rtol=0)
    assert to_image(tiled).size == (128, 96)


def test_inspect_tells_of_the_stripes(run, bundles: tuple[Bundle, Bundle]):
    whole, tiled = (run("inspect", bundle.path)[1] for bundle in bundles)
    assert "the whole image at once" in whole
    assert f"stripes of {TILE} latent rows" in tiled


def test_described_stages_are_those_of_a_build(bundles: tuple[Bundle, Bundle]):
    """What the tests of the layout stand on."""
    built = bundles[1].manifest
    described = manifest_for(built.plan, built.transformer, built.text_length, IMAGES, TILE)
    assert described.tiles == built.tiles
    for name in {name for stage in built.tiles.stages for name in (stage.engine, stage.last)}:
        assert border(described.engines[name]) == border(built.engines[name]), name
        assert described.engines[name].weights == built.engines[name].weights


def test_on_a_gpu_all_stripes_are_one_launch(bundles: tuple[Bundle, Bundle], tmp_path: Path):
    """The fake GPU refuses addresses that are no multiples of 256, and leaves garbage in scratch memory."""
    driver = FakeDriver()
    gpu = Bundle.open(fake_gpu_bundle(bundles[1].path, tmp_path / "gpu", 1000))
    workspace = Session(gpu, backend=FakeBackend(driver)).workspace(2)
    np.testing.assert_array_equal(drawn(workspace), drawn(Session(bundles[1]).workspace(2)))
    driver.calls.clear()
    workspace.decode()
    assert driver.count["cuGraphLaunch"] == 1
    assert driver.count["enqueue"] == 0
