"""The layout is checked by playing it: every byte remembers its writer, every read knows who that should be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.core.policy import DENSE, PruningPolicy, ScaleRule
from fastvar.core.schedule import ScaleSchedule, Size
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import EDGE_OUTSIDE, Manifest
from fastvar.engines.device import ALIGNMENT
from fastvar.engines.spec import EngineSpec, TensorSpec
from fastvar.errors import BundleError, InternalError
from fastvar.runtime.memory.layout import EngineCall, Layout, StepCalls, View, WeightView, build_layout
from fastvar.runtime.memory.placement import Phase, aligned
from fastvar.runtime.memory.stripes import WITH_HALO
from tests.models.described_engines import manifest_for, model

FLOAT_BYTES = 4
SCRATCH = -2  # in place of a writer: what an engine left in its scratch memory
SUB_LAYERS = ("sa", "ca", "ffn")


@dataclass
class Play:
    """Who wrote what is read: reads[reader, tensor] = [(writer, tensor, bytes), ...], in the order of the bytes."""

    manifest: Manifest
    layout: Layout
    reads: dict[tuple[Any, str], list[tuple[Any, str, int]]] = field(default_factory=dict)
    written: list[tuple[Any, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._owner = np.full(self.layout.arena_bytes, -1)
        layout = self.layout
        self.call("encoder", layout.encoder, host=("image",))
        self.read("image tokens", {"latent": views(layout.encoder)["latent"]} if layout.encoder else {})
        self.call("prompt", layout.text_encoder, host=("ids", "attention_mask"))
        self.call("negative", layout.uncond_encoder, host=("ids", "attention_mask"))
        self.call("conditioning", layout.conditioning, host=("mask",))
        for call in layout.layer_conditioning:
            self.call(("text_kv", call.layer), call)
        settings = ("summed", "tau", "cut", "guidance")
        self.write("settings", {n: v for n, v in views(layout.steps[0].sampling_head).items() if n in settings})
        for position, step in enumerate(layout.steps):
            self.step(position, step)
        for number, call in enumerate(layout.decode):
            self.call(("decode", number) if self.manifest.tiles else "decoder", call)
        assert layout.image is not None
        self.read("user", {"image": layout.image})

    def step(self, position: int, calls: StepCalls) -> None:
        self.write(("host", position), {"noise": calls.drawn["noise"]})
        self.read(("host", position), {"block_in": calls.block_in})
        for name, call in zip(itertools.cycle(("qkv", "attn_mlp")), calls.layers, strict=False):
            self.call((name, position, call.layer), call)
        self.call(("sampling_head", position), calls.sampling_head)
        results = {"logits": views(calls.sampling_head)["logits"], "summed_out": calls.summed}
        kept = {f"{layer}.{name}": view for layer, found in calls.kept.items() for name, view in found.items()}
        self.read(("host", position), {**results, **kept})

    def call(self, label: Any, call: EngineCall | None, host: tuple[str, ...] = ()) -> None:
        if call is None:
            return
        spec, bound = self.manifest.engines[call.engine], views(call)
        self.write(("host", label), {name: bound[name] for name in host})
        if label == "prompt":
            self.write("brought", dict(self.layout.offloaded_weights))
        if call.scratch is not None:
            self._owner[extent(self.layout, call.scratch)] = SCRATCH
        self.read(label, {t.name: within(call, t.name, bound[t.name]) for t in spec.inputs if t.name in bound})
        self.write(label, {t.name: bound[t.name] for t in spec.outputs})
        for copy in call.copies:  # what is read at the target was written by who wrote the source
            self._owner[extent(self.layout, copy.target)] = self._owner[extent(self.layout, copy.source)]

    def write(self, label: Any, tensors: dict[str, View]) -> None:
        for name, view in tensors.items():
            self._owner[extent(self.layout, view)] = len(self.written)
            self.written.append((label, name))

    def read(self, label: Any, tensors: dict[str, View]) -> None:
        for name, view in tensors.items():
            owners = self._owner[extent(self.layout, view)]
            assert (owners != SCRATCH).all(), f"{label} reads {name} where an engine worked"
            assert (owners >= 0).all(), f"{label} reads {name} where nobody has written"
            ends = [*(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
            starts = [0, *ends[:-1]]
            self.reads[label, name] = [
                (*self.written[owners[start]], end - start) for start, end in zip(starts, ends, strict=True)
            ]

    def whole(self, label: Any, name: str) -> tuple[Any, str]:
        """The one writer of all that is read."""
        ((writer, tensor, _),) = self.reads[label, name]
        return writer, tensor


def views(call: EngineCall) -> dict[str, View]:
    return {name: view for name, view in call.tensors.items() if isinstance(view, View)}


def within(call: EngineCall, name: str, view: View) -> View:
    """Without the rows beyond the image that a stripe at its end is bound to."""
    outside = [call.tensors.get(end) for end in ("above", "below")] if name in WITH_HALO else []
    above, below = (isinstance(end, WeightView) and end.name == EDGE_OUTSIDE for end in outside or (None, None))
    rows, *rest = view.shape
    row_bytes = view.size // rows
    return replace(view, start=view.start + above * row_bytes, shape=(rows - above - below, *rest))


def extent(layout: Layout, view: View) -> slice:
    start = layout.buffers[view.buffer].offset + view.start
    return slice(start, start + view.size)


def all_calls(layout: Layout) -> Iterator[EngineCall]:
    once = (layout.encoder, layout.text_encoder, layout.uncond_encoder, layout.conditioning, *layout.layer_conditioning)
    yield from (call for call in once if call is not None)
    for step in layout.steps:
        yield from (*step.layers, step.sampling_head)
    yield from layout.decode


@st.composite
def schedules(draw: st.DrawFn) -> ScaleSchedule:
    growth = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5))
    sizes: list[Size] = [(1, 1)]
    for more_rows, more_columns in growth:
        sizes.append((sizes[-1][0] + more_rows, sizes[-1][1] + more_columns))
    return ScaleSchedule(tuple(sizes), sizes[-1])


@st.composite
def plans(draw: st.DrawFn) -> GenerationPlan:
    schedule = draw(schedules())
    depth = draw(st.integers(1, 3))
    first = draw(st.integers(0, depth))
    stop = draw(st.integers(first, depth))
    cached = draw(st.integers(0, len(schedule) - 1))
    skip = st.just(ScaleRule(skip=True))
    early = {i: draw(skip) for i in range(1, cached) if draw(st.booleans())}
    late = {i: draw(skip | st.builds(ScaleRule, st.floats(0.05, 1))) for i in range(cached + 1, len(schedule))}
    policy = PruningPolicy("drawn", early | late, first, stop, cached)
    return make_plan(schedule, without_guidance(policy, draw(st.integers(1, 2 * len(schedule))), schedule), depth)


def without_guidance(policy: PruningPolicy, start: int, schedule: ScaleSchedule) -> PruningPolicy:
    """Guidance off from a scale on."""
    off = {i: replace(policy.rule(i), guidance=False) for i in range(start, len(schedule))}
    return replace(policy, rules={**policy.rules, **off})


LADDER = ScaleSchedule(((1, 1), (2, 2), (3, 4), (4, 4), (5, 6)), (5, 6))
PRUNED = make_plan(LADDER, PruningPolicy("some", {3: ScaleRule(0.5), 4: ScaleRule(0.3)}, 1, 3, 2), 4)
SKIPPED = make_plan(
    LADDER, PruningPolicy("gaps", {1: ScaleRule(skip=True), 3: ScaleRule(0.4), 4: ScaleRule(skip=True)}, 0, 2, 2), 2
)
UNGUIDED = make_plan(LADDER, without_guidance(PRUNED.policy, 3, LADDER), 4)
layouts = st.builds(
    lambda plan, patchify, rows: laid_out(plan, patchify, rows), plans(), st.booleans(), st.sampled_from((1, 2))
)


def laid_out(plan: GenerationPlan, patchify: bool = False, rows: int = 2) -> tuple[Manifest, Layout]:
    manifest = manifest_for(plan, model(plan.depth, patchify))
    return manifest, build_layout(manifest, rows)


def over_generations(test: Any) -> Any:
    """Random generations, and always a dense, a pruned, a skipping one, and one whose guidance ends."""
    for plan in (make_plan(LADDER, DENSE, 2), PRUNED, SKIPPED, UNGUIDED):
        test = example(laid_out(plan))(test)
    return settings(max_examples=20, deadline=None)(given(layouts)(test))


def test_described_engines_are_those_of_a_build(editing_bundle: Path):
    """What all other tests here stand on."""
    built = Bundle.open(editing_bundle).manifest
    described = manifest_for(built.plan, built.transformer, built.text_length)
    assert described.sets == built.sets
    for name in {n for n in built.engines if n not in (built.text_encoder, built.decoder, built.encoder)}:
        assert border(described.engines[name]) == border(built.engines[name]), name
        assert described.engines[name].weights == built.engines[name].weights, name
    assert border(described.engines["text-encoder"]) == border(built.engines[built.text_encoder])
    assert border(described.engines[described.decoder]) == border(built.engines[built.decoder])
    assert border(described.engines[described.encoder]) == border(built.engines[built.encoder])


def border(spec: EngineSpec) -> tuple[set[TensorSpec], set[TensorSpec]]:
    return {t for t in spec.inputs if t.name not in spec.weights}, set(spec.outputs)


@over_generations
def test_every_tensor_of_every_engine_is_bound(generation: tuple[Manifest, Layout]):
    manifest, layout = generation
    for call in all_calls(layout):
        spec = manifest.engines[call.engine]
        tensors = {t.name: t for t in (*spec.inputs, *spec.outputs)}
        assert call.tensors.keys() == tensors.keys()
        for name, binding in call.tensors.items():
            if name in spec.weights:
                named = spec.weights[name].replace("{layer}", str(call.layer))
                assert binding == WeightView(named, tensors[name].dtype, tensors[name].shape)
            else:
                assert isinstance(binding, View)
                assert (binding.dtype, binding.shape) == (tensors[name].dtype, tensors[name].shape)


@over_generations
def test_slots_lie_apart_and_hold_their_views(generation: tuple[Manifest, Layout]):
    _, layout = generation
    for buffer in layout.buffers.values():
        assert buffer.offset % ALIGNMENT == 0
        assert buffer.offset + buffer.size <= layout.arena_bytes
    for one, other in itertools.combinations(layout.buffers.values(), 2):
        if one.first <= other.last and other.first <= one.last:
            assert one.offset + one.size <= other.offset or other.offset + other.size <= one.offset, (one, other)
    for view in (view for call in all_calls(layout) for view in views(call).values()):
        assert view.start >= 0
        assert view.start + view.size <= layout.buffers[view.buffer].size
        assert view.start % (8 if view.dtype == "int64" else FLOAT_BYTES) == 0


@over_generations
def test_no_engine_writes_where_it_reads(generation: tuple[Manifest, Layout]):
    manifest, layout = generation
    for call in all_calls(layout):
        bound, outputs = views(call), [t.name for t in manifest.engines[call.engine].outputs]
        for name, other in itertools.product(outputs, bound):
            if name != other:
                a, b = extent(layout, bound[name]), extent(layout, bound[other])
                assert a.stop <= b.start or b.stop <= a.start, f"{call.engine}: {name} overlaps {other}"


@over_generations
def test_keys_and_values_land_behind_the_past(generation: tuple[Manifest, Layout]):
    manifest, layout = generation
    plan = manifest.plan
    row_bytes = manifest.transformer.width * FLOAT_BYTES
    for calls in layout.steps:
        token_bytes = calls.rows * row_bytes
        assert calls.rows == (layout.rows if calls.step.guided else 1)
        for layer, (qkv, attn_mlp) in enumerate(zip(calls.layers[::2], calls.layers[1::2], strict=True)):
            pruned = plan.policy.first_layer <= layer < plan.policy.stop_layer
            past = calls.step.past_pruned if pruned else calls.step.past_dense
            new = calls.step.kept if pruned else calls.step.tokens
            guided = calls.step.guided_past(pruned)
            narrowed = calls.rows < layout.rows
            start = guided * layout.rows * row_bytes if narrowed else 0
            for name in ("keys", "values"):
                written, read = views(qkv)[name], views(attn_mlp)[name]
                assert written.buffer == read.buffer
                assert (read.start, read.start + read.size) == (start, written.start + written.size)
                assert written.size == new * token_bytes
                assert written.start == start + (past - guided if narrowed else past) * token_bytes
    if layout.rows == 1 or all(step.guided for step in plan.steps):
        for layer in range(plan.depth):
            assert layout.buffers[f"keys.{layer}"].size == plan.capacity(layer) * layout.rows * row_bytes


@over_generations
def test_residual_stream_runs_from_engine_to_engine(generation: tuple[Manifest, Layout]):
    manifest, layout = generation
    play, previous = Play(manifest, layout), ("conditioning", "x")
    for position in range(len(layout.steps)):
        assert play.whole(("host", position), "block_in") == previous
        for layer in range(manifest.plan.depth):
            assert play.whole(("qkv", position, layer), "x") == previous
            assert play.whole(("attn_mlp", position, layer), "x") == previous
            previous = (("attn_mlp", position, layer), "x_out")
        assert play.whole(("sampling_head", position), "x") == previous
        previous = (("sampling_head", position), "x_next")


@over_generations
def test_attention_reads_the_keys_of_all_scales_in_order(generation: tuple[Manifest, Layout]):
    manifest, layout = generation
    play = Play(manifest, layout)
    row_bytes = manifest.transformer.width * FLOAT_BYTES
    for position, layer in itertools.product(range(len(layout.steps)), range(manifest.plan.depth)):
        pruned = manifest.plan.policy.prunes(layer)
        for name in ("keys", "values"):
            label = ("attn_mlp", position, layer)
            assert [*play.reads.get((label, f"guided_{name}"), ()), *play.reads[label, name]] == [
                (("qkv", i, layer), name, (step.kept if pruned else step.tokens) * calls.rows * row_bytes)
                for i, (step, calls) in enumerate(zip(manifest.plan.steps[: position + 1], layout.steps, strict=False))
            ]
        assert play.whole(("attn_mlp", position, layer), "q") == (("qkv", position, layer), "q")


@over_generations
def test_keys_that_may_not_lie_where_they_belong_are_copied_there(generation: tuple[Manifest, Layout]):
    """The described model's keys take 32 or 64 bytes a token; a library may want every address at 256."""
    manifest = replace(generation[0], address_alignment=ALIGNMENT)
    layout = build_layout(manifest, generation[1].rows, offload_text_encoder=bool(generation[1].offloaded_weights))
    for call in all_calls(layout):
        for view in views(call).values():
            assert (layout.buffers[view.buffer].offset + view.start) % ALIGNMENT == 0
    play, plain = Play(manifest, layout), Play(*generation)
    assert play.reads == plain.reads


@over_generations
def test_pruned_layers_restore_from_their_own_cache(generation: tuple[Manifest, Layout]):
    manifest, layout = generation
    play, filled = Play(manifest, layout), [i for i, s in enumerate(manifest.plan.steps) if s.writes_restore_cache]
    for position, step in enumerate(manifest.plan.steps):
        pruned = {n for n in range(manifest.plan.depth) if step.prunes and manifest.plan.policy.prunes(n)}
        assert layout.steps[position].kept.keys() == pruned
        for layer in pruned:
            label = ("attn_mlp", position, layer)
            assert play.whole(label, "kept") == (("qkv", position, layer), "kept")
            assert play.whole(("host", position), f"{layer}.sa") == (("qkv", position, layer), "kept")
            for sub_layer in SUB_LAYERS:
                assert play.whole(label, f"cached_{sub_layer}") == (
                    ("attn_mlp", filled[0], layer),
                    f"cache_{sub_layer}",
                )
            for sub_layer in ("ca", "ffn"):
                assert play.whole(("host", position), f"{layer}.{sub_layer}") == (label, f"kept_{sub_layer}")


@over_generations
def test_text_noise_settings_and_sum_reach_their_readers(generation: tuple[Manifest, Layout]):
    manifest, layout = generation
    play = Play(manifest, layout)
    assert play.whole("conditioning", "cond") == ("prompt", "features")
    if layout.rows == 2:
        assert play.whole("conditioning", "uncond") == ("negative", "features")
    for layer in range(manifest.plan.depth):
        assert play.whole(("text_kv", layer), "text") == ("conditioning", "text")
    summed = ("settings", "summed")
    for position in range(len(layout.steps)):
        for layer in range(manifest.plan.depth):
            label = ("attn_mlp", position, layer)
            assert play.whole(("qkv", position, layer), "modulation") == ("conditioning", "modulation")
            for name in ("modulation", "text_bias"):
                assert play.whole(label, name) == ("conditioning", name)
            for name in ("text_keys", "text_values"):
                assert play.whole(label, name) == (("text_kv", layer), name)
        sampling_head = ("sampling_head", position)
        assert play.whole(sampling_head, "noise") == (("host", position), "noise")
        assert play.whole(sampling_head, "head_modulation") == ("conditioning", "head_modulation")
        for name in ("tau", "cut", "guidance")[: layout.steps[position].rows + 1]:
            assert play.whole(sampling_head, name) == ("settings", name)
        assert play.whole(sampling_head, "summed") == summed
        summed = (sampling_head, "summed_out")
        assert play.whole(("host", position), "summed_out") == summed
    assert play.whole("decoder", "summed") == summed
    assert play.whole("user", "image") == ("decoder", "image")


@over_generations
def test_nothing_is_computed_in_vain(generation: tuple[Manifest, Layout]):
    play = Play(*generation)
    read = {(writer, tensor) for sources in play.reads.values() for writer, tensor, _ in sources}
    assert set(play.written) - read == set()


def test_one_row_takes_half_the_cache():
    manifest = manifest_for(PRUNED, model(PRUNED.depth))
    one, two = build_layout(manifest, 1), build_layout(manifest, 2)
    assert one.uncond_encoder is None
    for name in [n for n in one.buffers if n.startswith(("keys.", "values.", "text_keys.", "cache_", "x", "q"))]:
        assert 2 * one.buffers[name].size == two.buffers[name].size


def test_bundle_without_text_encoder_plans_none():
    layout = build_layout(replace(manifest_for(PRUNED, model(PRUNED.depth)), text_encoder=""), 2)
    assert layout.text_encoder is None
    assert layout.uncond_encoder is None
    assert "cond" in layout.buffers


@over_generations
def test_image_encoder_takes_room_only_where_it_wants_more_than_drawing(generation: tuple[Manifest, Layout]):
    manifest, layout = generation
    offloaded = bool(layout.offloaded_weights)
    without = build_layout(replace(manifest, encoder=""), layout.rows, offload_text_encoder=offloaded)
    assert without.encoder is None
    own = [buffer for buffer in layout.buffers.values() if buffer.last == Phase.ENCODE]
    assert {buffer.name for buffer in own} >= {"given_image", "latent"}
    needed = sum(aligned(buffer.size) for buffer in own)
    assert layout.arena_bytes == max(without.arena_bytes, needed)


def test_guidance_rows_that_were_not_built():
    manifest = manifest_for(PRUNED, model(PRUNED.depth))
    with pytest.raises(BundleError, match=r"no engines for 1 guidance row") as error:
        build_layout(replace(manifest, sets=manifest.sets[:1]), 1)
    assert "--guidance both" in error.value.fix


def test_tensor_that_nobody_planned_is_a_bug():
    manifest = manifest_for(PRUNED, model(PRUNED.depth))
    name = manifest.sets[0].conditioning
    spec = manifest.engines[name]
    strange = replace(spec, inputs=(*spec.inputs, TensorSpec("surprise", "float32", (1,))))
    with pytest.raises(InternalError, match="surprise"):
        build_layout(replace(manifest, engines={**manifest.engines, name: strange}), 2)
