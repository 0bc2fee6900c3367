"""The layout is checked by playing it: every byte remembers its writer, every read knows who that should be."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.device import ALIGNMENT
from fastvar.engines.spec import EngineSpec, TensorSpec
from fastvar.errors import BundleError, InternalError
from fastvar.runtime.memory.layout import Layout, View, WeightView, build_layout
from fastvar.runtime.memory.placement import Phase, aligned
from tests.models.described_engines import manifest_for, model
from tests.runtime.memory.generations import PRUNED, over_generations
from tests.runtime.memory.play import Play, all_calls, extent, views

FLOAT_BYTES = 4
SUB_LAYERS = ("sa", "ca", "ffn")


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
