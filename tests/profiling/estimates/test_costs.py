"""Costs from shapes, against torch's own count of the very modules that are exported, and against known totals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastvar.core.plan import Batch, GenerationPlan, SamplingMode, make_plan
from fastvar.core.policy import DENSE
from fastvar.core.precision import Precision
from fastvar.engines.bundle.bundle import Bundle
from fastvar.engines.bundle.manifest import Manifest
from fastvar.engines.registry import backend_class
from fastvar.export.assembly import Assembly, assemble
from fastvar.export.checkpoints.random_weights import random_checkpoint
from fastvar.export.describe import describe
from fastvar.export.models.common.coders import TextEncoder
from fastvar.export.models.common.rows import INTEGERS
from fastvar.export.options import BuildOptions
from fastvar.families import family_of, named_transformer
from fastvar.families.infinity import TRANSFORMERS, image_tokenizer_for
from fastvar.families.infinity_presets import fastvar_policy, schedule_for
from fastvar.profiling.estimates.costs import Cost, EngineCosts, Kind, add, decoder_cost, engine_costs
from fastvar.runtime.memory.layout import build_layout

T = 10**12
GIB = 1 << 30


def infinity_2b(policy: str, size: int = 1024, text_length: int = 3) -> Manifest:
    config, schedule = TRANSFORMERS["infinity_2b"], schedule_for((size, size))
    chosen = DENSE if policy == "dense" else fastvar_policy(schedule, config.depth)
    return described("infinity_2b", make_plan(schedule, chosen, config.depth), text_length)


def described(name: str, plan: GenerationPlan, text_length: int | None = None) -> Manifest:
    """A published size's bundle, with the real shapes of its weights."""
    made = random_checkpoint(name)
    return describe(made, plan, backend_class("onnxruntime"), Precision(), BuildOptions(text_length=text_length))


def blocks(costs: EngineCosts) -> Cost:
    return add(call.cost for call in costs.calls if call.kind in (Kind.QKV, Kind.ATTN_MLP))


@pytest.mark.parametrize(
    ("policy", "size", "tera", "gib"),
    [("dense", 1024, 115, 5.1), ("fastvar", 1024, 27, 1.6), ("dense", 2048, 649, 16.6), ("fastvar", 2048, 129, 4.9)],
)
def test_infinity_2b_costs_what_was_worked_out_by_hand(policy: str, size: int, tera: float, gib: float):
    """With a guidance pair, next to no text, and a cache in 16 bits (those described are in 32)."""
    costs = engine_costs(infinity_2b(policy, size), 2)
    assert blocks(costs).flop / T == pytest.approx(tera, rel=0.01)
    assert costs.kv_cache_bytes / 2 / GIB == pytest.approx(gib, abs=0.06)


def test_one_guidance_row_costs_half_of_the_blocks():
    manifest = infinity_2b("fastvar")
    one, two = engine_costs(manifest, 1), engine_costs(manifest, 2)
    assert blocks(two).flop == 2 * blocks(one).flop
    assert two.kv_cache_bytes == 2 * one.kv_cache_bytes


def test_the_text_is_attended_to_by_every_kept_token():
    short, long = (blocks(engine_costs(infinity_2b("fastvar", text_length=n), 2)) for n in (3, 512))
    plan, width = infinity_2b("fastvar").plan, TRANSFORMERS["infinity_2b"].width
    assert long.attention_flop - short.attention_flop == 4 * width * 2 * plan.forwarded_tokens * (512 - 3)
    assert long.gemm_flop == short.gemm_flop


def counted(module: torch.nn.Module, shapes: dict[str, tuple[int, ...]], weights: dict[str, tuple[int, ...]]) -> int:
    """FLOP by torch's counter; nothing is computed."""
    inputs = {n: torch.empty(s, device="meta", dtype=integer(n)) for n, s in shapes.items()}
    with torch.device("meta"):
        given = {name: torch.empty(shape) for name, shape in weights.items()}
        with FlopCounterMode(display=False) as counter:
            module(*inputs.values(), weights=given)
    return counter.get_total_flops()


def integer(name: str) -> torch.dtype:
    return torch.int64 if name in INTEGERS else torch.float32


def rebuilt(manifest: Manifest, rows: tuple[int, ...], encoder: Any) -> Assembly:
    length = manifest.text_length
    return assemble(
        manifest.plan, manifest.transformer, manifest.image_tokenizer, encoder, length, [Batch(r) for r in rows]
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_every_engine_costs_what_torch_counts(tiny_bundle: Path, tiny_checkpoint, rows: int):
    manifest = Bundle.open(tiny_bundle).manifest
    graphs = rebuilt(manifest, (2, 1), tiny_checkpoint.text_encoder).graphs
    seen = set()
    for call in engine_costs(manifest, rows).calls:
        graph, spec = graphs[call.engine], manifest.engines[call.engine]
        weights = {t.name: t.shape for t in spec.inputs if t.name in spec.weights}
        module = graph.factory(**graph.arguments).to("meta")
        flop = counted(module, module.input_shapes(), weights)
        if call.kind is Kind.ATTN_MLP and call.scale == 0:  # over its one key twice, for the compilers' sake
            flop -= 4 * rows * manifest.transformer.width
        # The pooling of the text has a single query, and is written as a sum.
        pooled = call.cost.attention_flop if call.kind is Kind.CONDITION else 0
        assert call.cost.flop - pooled == flop, call
        assert flop > 0
        seen.add(call.kind)
    assert seen == set(Kind) - {Kind.PICK, Kind.RESIDUAL}


OTHERS = {
    "var_d16": SamplingMode(),
    "hart_0.7b": SamplingMode(),
    "hart_0.7b in parts": SamplingMode(final_iterations=3),
}


@pytest.mark.parametrize("case", OTHERS)
def test_engines_of_other_families_cost_what_torch_counts(case: str):
    """But for sampling heads, where torch counts running sums as products, and products with resizing matrices."""
    config = named_transformer(case.split()[0])
    family, schedule = family_of(config), config.schedule
    policy = family.policy("dense" if "parts" in case else "fastvar", schedule, config.depth)
    plan = family.plan(schedule, policy, config, OTHERS[case])
    manifest = described(case.split()[0], plan)
    graphs, seen = rebuilt(manifest, (2, 1), None).graphs, set()
    for call in engine_costs(manifest, 2).calls:
        if call.layer not in (None, 0) or call.kind in (Kind.SAMPLING_HEAD, Kind.PICK, Kind.DECODER):
            continue
        graph, spec = graphs[call.engine], manifest.engines[call.engine]
        weights = {t.name: t.shape for t in spec.inputs if t.name in spec.weights}
        module = graph.factory(**graph.arguments).to("meta")
        flop = counted(module, module.input_shapes(), weights)
        if call.kind is Kind.ATTN_MLP and spec.tensor("keys").shape[0] == 1:
            flop -= 4 * 2 * config.width
        assert call.cost.flop == pytest.approx(flop, rel=2e-3), call
        seen.add(call.kind)
    assert {Kind.QKV, Kind.ATTN_MLP, Kind.CONDITION} < seen
    assert (Kind.RESIDUAL in seen) == case.startswith("hart")


@pytest.mark.parametrize("name", ["infinity_2b", "infinity_8b"])
def test_decoders_of_published_models_cost_what_torch_counts(name: str):
    from fastvar.export.models.infinity.tokenizer import Decoder

    config = image_tokenizer_for(TRANSFORMERS[name])
    with torch.device("meta"):
        decoder, codes = Decoder(config), torch.empty(1, config.bits, 6, 10)
        with FlopCounterMode(display=False) as counter:
            decoder(codes)
    shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()}
    assert decoder_cost(shapes, (6, 10)).flop == counter.get_total_flops()


def test_bridges_of_patchified_models_cost_what_torch_counts():
    config, schedule = TRANSFORMERS["infinity_8b"], schedule_for((592, 1184))
    manifest = described("infinity_8b", make_plan(schedule, DENSE, config.depth))
    graphs = rebuilt(manifest, (2, 1), None).graphs
    width, channels = config.width, config.code_channels
    weights = {"head.weight": (2 * channels, width), "head.bias": (2 * channels,)}
    weights |= {"word_embed.weight": (width, channels), "word_embed.bias": (width,), "lvl_embed.weight": (15, width)}
    sampling_heads = [call for call in engine_costs(manifest, 2).calls if call.kind is Kind.SAMPLING_HEAD]
    assert len(sampling_heads) == len(schedule)
    for call in sampling_heads:
        module = graphs[call.engine].factory(**graphs[call.engine].arguments).to("meta")
        assert counted(module, module.input_shapes(), weights) == call.cost.flop, call.engine


def test_bytes_are_those_of_every_tensor_that_is_bound(tiny_bundle: Path):
    """Of embedding tables only the rows that are looked up."""
    manifest = Bundle.open(tiny_bundle).manifest
    costs, layout = engine_costs(manifest, 2), build_layout(manifest, 2)
    calls = [call for call in layout.calls() if call is not layout.uncond_encoder]
    assert len(calls) == len(costs.calls)
    for cost, call in zip(costs.calls, calls, strict=True):
        assert cost.engine == call.engine
        whole = sum(binding.size for binding in call.tensors.values())
        unread = 0
        if "shared.weight" in call.tensors:
            unread += (call.tensors["shared.weight"].shape[0] - 16) * 128 * 4
        if "lvl_embed.weight" in call.tensors:
            unread += (call.tensors["lvl_embed.weight"].shape[0] - 1) * 64 * 4
        assert cost.cost.bytes_moved == whole - unread, call.engine


def test_a_copy_behind_an_engine_is_read_and_written(tiny_bundle: Path):
    manifest = Bundle.open(tiny_bundle).manifest
    plain, copied = (engine_costs(replace(manifest, address_alignment=n), 2) for n in (1, 1 << 20))
    for before, after in zip(plain.calls, copied.calls, strict=True):
        keys = manifest.engines[after.engine].tensor("keys") if after.kind is Kind.QKV else None
        moved = 0 if keys is None or after.scale == 0 else 4 * 4 * torch.Size(keys.shape).numel()
        assert after.cost.bytes_moved - before.cost.bytes_moved == moved, after


def test_sums_add_up(tiny_bundle: Path):
    costs = engine_costs(Bundle.open(tiny_bundle).manifest, 2)
    outside = add(call.cost for call in costs.calls if call.scale is None)
    assert list(costs.by_scale()) == [0, 2, 6]
    assert add(iter(costs.by_scale().values())) + outside == costs.total
    assert add(iter(costs.by_kind().values())) == costs.total
    assert costs.total.flop == costs.total.gemm_flop + costs.total.attention_flop + costs.total.convolution_flop


def test_a_bundle_without_a_text_encoder_has_no_cost_for_it():
    manifest = replace(infinity_2b("fastvar"), text_encoder="")
    assert Kind.TEXT_ENCODER not in engine_costs(manifest, 2).by_kind()
    assert TextEncoder.inputs == ("ids", "attention_mask")
