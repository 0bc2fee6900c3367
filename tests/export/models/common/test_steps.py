"""The step modules, run eagerly and chained by hand, against the reference: the arithmetic without the export."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvar.core.plan import GenerationPlan, StepPlan
from fastvar.core.policy import DENSE
from fastvar.export.models.common.weights import WeightSource
from fastvar.export.models.infinity.blocks import AttnMlp, Qkv
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.export.models.infinity.steps import Conditioning, SamplingHead, TextKV
from fastvar.export.models.infinity.weights import halves_order, transformer_weights
from fastvar.families.infinity import TransformerConfig
from tests.models import tiny_models as tiny

SAMPLING = Sampling(guidance_scale=3.0, tau=0.7, top_p=0.9)


PLANS = {
    "dense": tiny.dense_plan(),
    "pruned": tiny.plan(),
    "unguided-pruned": tiny.plan(tiny.without_guidance(tiny.POLICY, 5)),
    "unguided-before-the-cached": tiny.plan(tiny.without_guidance(tiny.POLICY, 2)),
    "unguided-dense": tiny.plan(tiny.without_guidance(DENSE, 3)),
    "text-ends": tiny.plan(tiny.without_text(tiny.POLICY, 6)),
    "text-ends-one-selection": tiny.plan(replace(tiny.without_text(tiny.POLICY, 3), shared_selection=True)),
    "text-and-guidance-end": tiny.plan(tiny.without_text(tiny.without_guidance(tiny.POLICY, 5), 3)),
    "hardly-guided": tiny.plan(tiny.without_guidance(tiny.POLICY, 1)),
}


class Chain:
    """Runs the step modules in order with the caches the runtime would keep."""

    def __init__(self, model: InfinityTransformer, plan: GenerationPlan, rows: int) -> None:
        self.config, self.plan, self.rows = model.config, plan, rows
        self.sources: dict[str, WeightSource] = transformer_weights(model.config, model.state_dict())
        self.keys: list[list[Tensor]] = [[] for _ in range(plan.depth)]
        self.values: list[list[Tensor]] = [[] for _ in range(plan.depth)]
        self.cached: dict[int, tuple[Tensor, ...]] = {}
        self.kept: dict[int, dict[str, Tensor]] = {}

    def weights(self, module, layer: int | None = None) -> dict[str, Tensor]:
        prefix = "transformer." if layer is None else f"transformer.blocks.{layer}."
        return {name: self.sources[prefix + name].fetch() for name in module.weights}

    def run(self, features: Tensor, mask: Tensor):
        """Yields per step the block output [L * R, C], the logits, and the running sum."""
        c, plan = self.config, self.plan
        conditioning = Conditioning(c, self.rows, c.text_length)
        x, text, modulation, head, bias = conditioning(*features, mask.float(), weights=self.weights(conditioning))
        text_kv = TextKV(c, self.rows, c.text_length)
        kv = [text_kv(text, weights=self.weights(text_kv, layer)) for layer in range(plan.depth)]
        p = c.patch
        summed = torch.zeros(1, c.bits, plan.schedule.final[0] * p, plan.schedule.final[1] * p)
        for step, following in zip(plan.steps, [*plan.steps[1:], None], strict=True):
            own = step.rows(self.rows)
            for layer in range(plan.depth):
                x = self.block(x, step, layer, kv[layer], bias, modulation)
            onward, next_rows = (None, 0) if following is None else (following.size, following.rows(self.rows))
            sampling_head = SamplingHead(
                c, own, step.size, plan.schedule.final, onward, step.next_index, self.rows, next_rows
            )
            scalars = [torch.tensor([v]) for v in (SAMPLING.tau, 1 - SAMPLING.top_p)]
            guidance = [torch.tensor([SAMPLING.guidance_scale])] if own == 2 else []
            noise = tiny.noise(step.index, (step.tokens, c.code_channels))
            out = sampling_head(x, head, noise, *scalars, summed, *guidance, weights=self.weights(sampling_head))
            yield step, x, out[0], out[1]
            summed, x = out[1], out[-1]

    def block(self, x: Tensor, step: StepPlan, layer: int, kv, bias: Tensor, modulation: Tensor) -> Tensor:
        c, plan, own = self.config, self.plan, step.rows(self.rows)
        pruned = plan.policy.prunes(layer)
        kept = step.kept if pruned else step.tokens
        qkv = Qkv(c, own, step.size, kept, plan.schedule.rope_grid, self.rows)
        q, k, v, *chosen = qkv(x, modulation, weights=self.weights(qkv, layer))
        self.keys[layer].append(k)
        self.values[layer].append(v)
        fills = pruned and step.writes_restore_cache
        cached_size = plan.cached_size if kept < step.tokens else None
        cached_rows = next((s.rows(self.rows) for s in plan.steps if s.writes_restore_cache), 0)
        past = (step.past(pruned), step.guided_past(pruned))
        arguments: dict[str, Any] = {"shared": plan.policy.shared_selection} if chosen else {}
        arguments |= {"restored": ("ca",)} if chosen and not step.text else {}
        attn_mlp = AttnMlp(
            *(c, own, step.size, kept, past[0], c.text_length, cached_size, fills, self.rows, cached_rows, past[1]),
            **arguments,
        )
        older, newer = self.cached_keys(layer, own)
        extra = (*chosen, *self.cached[layer]) if chosen else ()
        text = () if "restored" in arguments else (*kv, bias)
        out = attn_mlp(x, q, *newer, *text, modulation, *extra, *older, weights=self.weights(attn_mlp, layer))
        if fills:
            self.cached[layer] = tuple(out[1:4])
        if chosen:
            names = ("sa", *(name.removeprefix("kept_") for name in attn_mlp.outputs[1:]))
            self.kept[layer] = dict(zip(names, (*chosen, *out[1:]), strict=True))
        return out[0]

    def cached_keys(self, layer: int, own: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of as many heads as this step has, and before them those of more."""
        heads = own * self.config.heads
        newer = tuple(torch.cat([t for t in c[layer] if t.shape[1] == heads]) for c in (self.keys, self.values))
        more = [[t for t in c[layer] if t.shape[1] > heads] for c in (self.keys, self.values)]
        return tuple(torch.cat(t) for t in more if t), newer


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.PATCHIFIED], ids=["plain", "patchified"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_chained_steps_equal_the_reference(rows: int, config: TransformerConfig, plan: GenerationPlan):
    model = tiny.model(config)
    features, mask = tiny.text(config, lengths=(5, 8)[:rows])
    chain = Chain(model, plan, rows)
    expected = generate_scales(model, features, mask, plan, tiny.noise, SAMPLING)
    for (step, x, logits, summed), trace in zip(chain.run(features, mask), expected, strict=True):
        by_row = x.view(-1, step.rows(rows), config.width).transpose(0, 1)
        torch.testing.assert_close(by_row, trace.layer_out[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits, trace.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(summed, trace.summed_codes, atol=1e-5, rtol=1e-5)
        if step.prunes:
            assert_same_tokens_kept(chain, trace.states, step.rows(rows))


def test_a_step_without_text_reads_nothing_of_it():
    arguments = (tiny.CONFIG, 2, (6, 8), 12, 50, tiny.CONFIG.text_length, (3, 4), False)
    with_text, without = AttnMlp(*arguments), AttnMlp(*arguments, restored=("ca",))
    assert set(with_text.inputs) - set(without.inputs) == {"text_keys", "text_values", "text_bias"}
    assert set(with_text.outputs) - set(without.outputs) == {"kept_ca"}
    assert {name.split(".")[0] for name in set(with_text.weights) - set(without.weights)} == {"ca", "ca_norm"}


def assert_same_tokens_kept(chain: Chain, states, rows: int) -> None:
    for layer, kept in chain.kept.items():
        for name, flat in kept.items():
            assert torch.equal(flat % rows, torch.arange(rows).repeat(len(flat) // rows))
            mine = (flat // rows).view(-1, rows).t().sort(-1).values
            assert torch.equal(mine, states[layer].kept[name].sort(-1).values)


def test_padding_of_the_text_changes_nothing():
    model = tiny.model()
    features, mask = tiny.text()
    shouted = torch.where(mask[..., None], features, torch.full_like(features, 50.0))
    chains = [Chain(model, tiny.dense_plan(), 2).run(f, mask) for f in (features, shouted)]
    for (_, a, _, _), (_, b, _, _) in zip(*chains, strict=True):
        torch.testing.assert_close(a, b)


def test_halves_order_is_a_permutation_within_heads():
    order = halves_order(tiny.CONFIG)
    hd = tiny.CONFIG.head_dim
    assert sorted(order.tolist()) == list(range(tiny.CONFIG.width))
    assert order[:hd].tolist() == [*range(0, hd, 2), *range(1, hd, 2)]
    assert (order // hd).tolist() == sorted((order // hd).tolist())
