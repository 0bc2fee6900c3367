"""Memory on a device of its own: every address that a launch is given, checked for random generations.

A recording device and recording engines take the place of a GPU; nothing is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.core.policy import DENSE
from fastvar.core.tensors import TensorRef
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.device import ALIGNMENT
from fastvar.engines.spec import EngineReport, EngineSpec, TensorSpec
from fastvar.families.infinity import TRANSFORMERS
from fastvar.runtime.memory.fit import device_need
from fastvar.runtime.memory.layout import TEXT_ENCODER_WEIGHTS, Layout, build_layout
from fastvar.runtime.memory.placement import Phase
from tests.fakes.recording import Launched, Played, Read, Written, apart, span, worked_in
from tests.models.described_engines import manifest_for, model
from tests.runtime.memory import generations, play, test_layout

NOBODY, GARBAGE = -1, -2  # in place of a writer


def as_for_a_gpu(manifest: Manifest, seed: int) -> Manifest:
    """Engines of a build want scratch memory, some of them, and weights of all sizes; so does the text encoder."""
    rng = np.random.default_rng(seed)
    engines: dict[str, EngineSpec] = {}
    for name, spec in manifest.engines.items():
        if name == manifest.text_encoder:
            sizes = rng.integers(1, 2000, size=3)
            more = tuple(TensorSpec(f"w{i}", "float32", (int(n),)) for i, n in enumerate(sizes))
            weights = {w.name: f"text_encoder.{w.name}" for w in more}
            spec = replace(spec, inputs=(*spec.inputs, *more), weights=weights)
        scratch = int(rng.integers(1, 6000)) if rng.random() < 0.7 else 0
        engines[name] = replace(spec, report=EngineReport(scratch))
    return replace(manifest, engines=engines)


def described(plan: GenerationPlan, patchify: bool, seed: int) -> Manifest:
    return as_for_a_gpu(manifest_for(plan, model(plan.depth, patchify)), seed)


manifests = st.builds(described, generations.plans(), st.booleans(), st.integers(0, 2**32 - 1))
played = st.builds(Played, manifests, st.booleans())
over_sessions = settings(max_examples=20, deadline=None)


@over_sessions
@given(played)
def test_everything_bound_lies_in_the_one_allocation(session: Played):
    (size,) = session.device.allocations
    need = device_need(session.layouts)
    assert size == need.total_bytes
    assert session.weight_bytes == need.weight_bytes
    for launch in session.prepared:
        for ref in launch.tensors.values():
            start, stop = span(ref)
            assert 0 <= start < stop <= size, launch.engine.name
        start, stop = worked_in(launch)
        assert 0 <= start <= stop <= size


@over_sessions
@given(played)
def test_weights_that_stay_lie_apart_from_each_other_and_from_the_arena(session: Played):
    spans = sorted(span(ref) for ref in session.uploads)
    for one, other in itertools.pairwise(spans):
        assert one[1] <= other[0]
    assert max(stop for _, stop in spans) <= session.weight_bytes
    stays = set(session.uploads)
    for launch in session.prepared:
        assert worked_in(launch)[0] >= session.weight_bytes or launch.scratch is None
        for name, ref in launch.tensors.items():
            if name in launch.engine.weights and not is_offloaded(session, launch):
                assert ref in stays, "it is bound to where it was copied"
            else:
                assert span(ref)[0] >= session.weight_bytes


ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_a_published_model_is_aligned(name: str, dtype: str, rows: int):
    """TensorRT wants 256-byte alignment of every address, the keys of a scale inside the cache included."""
    config = replace(TRANSFORMERS[name], depth=2, chunks=1)
    plan = make_plan(generations.LADDER, DENSE, config.depth)
    manifest = replace(computing_in(dtype, manifest_for(plan, config)), address_alignment=ALIGNMENT)
    layout = build_layout(manifest, rows)
    assert any(call.copies for call in layout.calls()) == (rows * config.width * ITEM_BYTES[dtype] % ALIGNMENT != 0)
    for call in layout.calls():
        for tensor, view in play.views(call).items():
            address = layout.buffers[view.buffer].offset + view.start
            assert address % ALIGNMENT == 0, f"{call.engine}: {tensor}"


def computing_in(dtype: str, manifest: Manifest) -> Manifest:
    """The keys and values of another type."""

    def changed(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(t, dtype=dtype) if t.name in ("keys", "values") else t for t in tensors)

    engines = {
        name: replace(spec, inputs=changed(spec.inputs), outputs=changed(spec.outputs))
        for name, spec in manifest.engines.items()
    }
    return replace(manifest, engines=engines)


def is_offloaded(session: Played, launch: Launched) -> bool:
    return session.offload and launch.engine.name == session.manifest.text_encoder


@over_sessions
@given(played)
def test_scratch_is_aligned_large_enough_and_away_from_the_tensors(session: Played):
    for launch in session.prepared:
        start, stop = worked_in(launch)
        assert stop - start >= launch.engine.report.scratch_bytes
        assert start % ALIGNMENT == 0
        for name, ref in launch.tensors.items():
            assert apart((start, stop), span(ref)), f"{launch.engine.name}: {name}"


@over_sessions
@given(played)
def test_weights_are_aligned(session: Played):
    refs = [ref for launch in session.prepared for n, ref in launch.tensors.items() if n in launch.engine.weights]
    assert all(ref.address % ALIGNMENT == 0 for ref in (*session.uploads, *refs))


@over_sessions
@given(played)
def test_no_engine_writes_into_what_it_reads(session: Played):
    for launch in session.prepared:
        outputs = {tensor.name for tensor in launch.engine.outputs}
        for name, other in itertools.product(outputs, launch.tensors):
            if name != other:
                assert apart(span(launch.tensors[name]), span(launch.tensors[other])), launch.engine.name


@over_sessions
@given(played, st.lists(st.tuples(st.sampled_from((1, 2)), st.booleans(), st.booleans()), min_size=1, max_size=3))
def test_every_image_reads_what_was_written_for_it_and_nothing_is_in_vain(
    session: Played, images: list[tuple[int, bool, bool]]
):
    """Images with and without guidance take turns in one arena: none may need what another has left there."""
    for rows, negative, wait in images:
        owner = np.full(session.device.allocations[0], NOBODY)
        for ref in session.uploads:
            owner[slice(*span(ref))] = 0
        vain = replay(session.image(rows, negative, wait), owner)
        ignored = set() if wait else {"kept_ca", "kept_ffn"}  # only those who listen look at them
        assert {name for name in vain if name not in ignored} == set()


def replay(log: list[Launched | Written | Read], owner: np.ndarray) -> list[str]:
    """Follow every byte; returns the tensors that were written and never read."""
    written, used = ["weights"], {0}

    def read(ref: TensorRef, who: str) -> None:
        found = set(np.unique(owner[slice(*span(ref))]).tolist())
        assert not found & {NOBODY, GARBAGE}, f"{who} reads what nobody wrote"
        used.update(found)

    def write(ref: TensorRef, name: str) -> None:
        owner[slice(*span(ref))] = len(written)
        written.append(name)

    for entry in log:
        if isinstance(entry, Read):
            read(entry.ref, "the host")
        elif isinstance(entry, Written):
            write(entry.ref, "from the host")
        else:
            owner[slice(*worked_in(entry))] = GARBAGE
            for tensor in entry.engine.inputs:
                read(entry.tensors[tensor.name], f"{entry.engine.name}, {tensor.name}")
            for tensor in entry.engine.outputs:
                write(entry.tensors[tensor.name], tensor.name)
    return [name for position, name in enumerate(written) if position not in used]


# The properties of every layout hold for one of a GPU as well


PROPERTIES: list[Callable[[tuple[Manifest, Layout]], None]] = [
    test.hypothesis.inner_test
    for name, test in vars(test_layout).items()
    if hasattr(test, "hypothesis") and name != "test_every_tensor_of_every_engine_is_bound"  # as to a host's weights
]


@pytest.mark.parametrize("test", PROPERTIES, ids=lambda test: test.__name__)
def test_property_of_layouts_with_scratch_and_offloading(test: Callable[[tuple[Manifest, Layout]], None]):
    @settings(max_examples=10, deadline=None)
    @given(manifests, st.sampled_from((1, 2)), st.booleans())
    def on_a_gpu(manifest: Manifest, rows: int, offload: bool) -> None:
        test((manifest, build_layout(manifest, rows, offload_text_encoder=offload)))

    on_a_gpu()


def test_properties_were_found():
    assert len(PROPERTIES) >= 8


@over_sessions
@given(manifests, st.sampled_from((1, 2)))
def test_offloaded_text_encoder_names_no_weights_that_stay(manifest: Manifest, rows: int):
    stays, leaves = (build_layout(manifest, rows, offload_text_encoder=offload) for offload in (False, True))
    weights = set(manifest.engines[manifest.text_encoder].weights.values())
    assert stays.weights().keys() - leaves.weights().keys() == weights == leaves.offloaded_weights.keys()
    assert not stays.offloaded_weights
    slot = leaves.buffers[TEXT_ENCODER_WEIGHTS]
    assert (slot.first, slot.last) == (Phase.TEXT, Phase.TEXT)
    ends = sorted((view.start, view.start + view.size) for view in leaves.offloaded_weights.values())
    assert all(apart(one, other) for one, other in itertools.pairwise(ends))


def played_once(plan: GenerationPlan, **options: Any) -> Played:
    return Played(described(plan, False, 0), **options)


@pytest.mark.parametrize("offload", [False, True])
def test_text_encoder_weights_come_with_every_image(offload: bool):
    session = played_once(generations.PRUNED, offload=offload)
    names = session.manifest.engines["text-encoder"].weights
    for _ in range(2):
        log = session.image(2, False, True)
        encoder = next(e for e in log if isinstance(e, Launched) and e.engine.name == "text-encoder")
        bound = [encoder.tensors[name] for name in names]
        before = [e.ref for e in log[: log.index(encoder)] if isinstance(e, Written)]
        assert [ref in before for ref in bound] == [offload] * len(bound)
