"""A whole VAR generation in eager torch: the oracle that chained engines are compared with. Clear before fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import GenerationPlan, StepPlan
from .pruning import LayerState, gather, restore, select
from .var import Block, Condition, VarTransformer
from .vq_tokenizer import Quantizer, area_pool

Shape = tuple[int, ...]
INFINITE = float("inf")
COLDEST = 0.005  # temperature of the smooth mixing, at least


@dataclass(frozen=True)
class VarSampling:
    """Sampling settings of one generation; the defaults are those of upstream's demo."""

    guidance_scale: float = 4.0  # 0: no guidance, and no unconditional rows
    top_k: int = 900  # 0: off
    top_p: float = 0.95  # 0: off
    smooth: bool = False  # mixtures of codes in place of drawn ones ("more_smooth")


@dataclass(frozen=True)
class Noise:
    """Random numbers by scale, or what takes their place. B counts images, S scales; a shape is asked for.

    uniform: (scale, (B, L)) -> [0, 1); -1 - i in place of a number forces code i.
    gumbel: (scale, (B, L, codes)) -> -log of exponential draws; asked for in smooth sampling alone.
    codes: (scale) -> [B, code_channels, h, w] in place of what was drawn or mixed, or None.
    """

    uniform: Callable[[int, Shape], Tensor]
    gumbel: Callable[[int, Shape], Tensor] | None = None
    codes: Callable[[int], Tensor | None] = lambda _: None


@dataclass
class ScaleTrace:
    """What one scale did, for comparison. B counts images; R guidance rows, all conditional ones first."""

    step: StepPlan
    block_in: Tensor  # [R, L, C], level and position embedding included
    layer_out: list[Tensor]  # per layer [R, L, C]
    logits: Tensor  # [B, L, codes], guided, before filtering
    kept_codes: Tensor  # [B, L, codes] bool: what top-k and top-p left
    token_map: Tensor  # [B, h, w] int64; drawn in smooth sampling too, and not used there
    mixture: Tensor | None  # [B, L, codes] weights of the codes, in smooth sampling
    codes: Tensor  # [B, code_channels, h, w], drawn or mixed, whatever was forced
    summed: Tensor  # [B, code_channels, H, W], this scale included
    states: list[LayerState]


def generate_scales(
    model: VarTransformer,
    quantizer: Quantizer,
    labels: Tensor,
    plan: GenerationPlan,
    noise: Noise,
    sampling: VarSampling,
) -> Iterator[ScaleTrace]:
    """Run every scale of a plan for classes `labels` [B] (int64)."""
    rows = torch.cat((labels, torch.full_like(labels, model.config.classes))) if sampling.guidance_scale else labels
    condition = model.condition(rows)
    states = [LayerState() for _ in model.layers]
    tokens = model.first_tokens(condition)
    summed = torch.zeros(len(labels), model.config.code_channels, *plan.schedule.final)
    scales = len(plan.schedule)
    for step in plan.steps:
        if not step.guided and len(tokens) > len(labels):
            condition, tokens = conditional_only(condition, tokens, states, len(labels))
        block_in = tokens + model.place(step.index)
        layer_out = run_layers(model, block_in, condition, plan, step, states)
        progress = step.index / max(scales - 1, 1)  # guidance grows with it, as upstream's does
        logits = guide(model.logits(layer_out[-1], condition), len(labels), sampling.guidance_scale * progress)
        filtered = filter_logits(logits, sampling.top_k, sampling.top_p)
        drawn = draw(filtered, noise.uniform(step.index, logits.shape[:2]))
        token_map = drawn.unflatten(1, step.size)
        codes, mixture = quantizer.lookup(token_map), None
        if sampling.smooth:
            assert noise.gumbel is not None
            mixture = mix(filtered, noise.gumbel(step.index, logits.shape), progress)
            codes = (mixture @ quantizer.embedding.weight).transpose(1, 2).unflatten(2, step.size)
        forced = noise.codes(step.index)
        used = codes if forced is None else forced
        summed = summed + quantizer.contribution(used, step.index, scales, plan.schedule.final)
        kept = filtered > -INFINITE
        yield ScaleTrace(step, block_in, layer_out, logits, kept, token_map, mixture, codes, summed, states)
        if step.next_index is not None:
            following = model.embed(area_pool(summed, plan.schedule.sizes[step.next_index]))
            tokens = following.repeat(len(tokens) // len(labels), 1, 1)


def conditional_only(
    condition: Condition, tokens: Tensor, states: list[LayerState], images: int
) -> tuple[Condition, Tensor]:
    """Guidance is switched off: what the unconditional rows knew and remember goes."""
    for state in states:
        assert state.keys is not None
        assert state.values is not None
        state.keys, state.values = state.keys[:images], state.values[:images]
        state.outputs = {name: out[:images] for name, out in state.outputs.items()}
    shared = None if condition.modulation is None else condition.modulation[:images]
    return Condition(condition.embedding[:images], shared), tokens[:images]


def run_layers(
    model: VarTransformer,
    x: Tensor,
    condition: Condition,
    plan: GenerationPlan,
    step: StepPlan,
    states: list[LayerState],
) -> list[Tensor]:
    """All blocks of one scale: the outputs of every layer."""
    outputs = []
    for i, (block, state) in enumerate(zip(model.layers, states, strict=True)):
        x = run_block(block, x, condition, plan, step, state, plan.policy.prunes(i))
        outputs.append(x)
    return outputs


def run_block(
    block: Block,
    x: Tensor,
    condition: Condition,
    plan: GenerationPlan,
    step: StepPlan,
    state: LayerState,
    pruned_layer: bool,
) -> Tensor:
    """One block on the residual stream x [R, L, C]; updates the layer's state.

    Both sub-layers select anew unless the policy says that they share; each guidance row by itself. Keep ratio 1 is
    the dense block.
    """
    sub_layers: dict[str, Callable[[Tensor], Tensor]] = {
        "sa": lambda tokens: _self_attention(block, tokens, condition, state),
        "ffn": lambda tokens: block.feed_forward(tokens, condition),
    }
    for name, sub_layer in sub_layers.items():
        if pruned_layer and step.prunes:
            assert plan.cached_size is not None
            shares = plan.policy.shared_selection and name != "sa"
            kept = state.kept["sa"] if shares else select(x, step.kept)
            out = restore(sub_layer(gather(x, kept)), kept, state.outputs[name], plan.cached_size, step.size)
            state.kept[name] = kept
        else:
            out = sub_layer(x)
        if step.fills_cache and pruned_layer:
            state.outputs[name] = out
        x = x + out
    return x


def _self_attention(block: Block, tokens: Tensor, condition: Condition, state: LayerState) -> Tensor:
    q, k, v = block.project_qkv(tokens, condition)
    if state.keys is not None and state.values is not None:
        k, v = torch.cat((state.keys, k), dim=2), torch.cat((state.values, v), dim=2)
    state.keys, state.values = k, v
    return block.self_attention(q, k, v, condition)


def guide(logits: Tensor, images: int, scale: float) -> Tensor:
    """[R, L, codes] -> [B, L, codes]: classifier-free guidance, where a scale of 0 changes nothing."""
    if len(logits) == images:
        return logits
    return (1 + scale) * logits[:images] - scale * logits[images:]


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Minus infinity outside top-k and then top-p; [..., codes].

    top-p goes by what top-k has left: the rarest codes go whose probabilities together are at most 1 - top_p, never the
    likeliest code. Among equal logits the lowest index stays longest.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -INFINITE)
    if top_p <= 0:
        return logits
    ordered, index = (t.flip(-1) for t in torch.sort(logits, descending=True, stable=True))
    goes = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    goes[..., -1] = False
    return logits.masked_fill(goes.scatter(-1, index, goes.clone()), -INFINITE)


def draw(filtered: Tensor, uniform: Tensor) -> Tensor:
    """Codes [B, L] for filtered logits [B, L, codes] and one number each in [0, 1); -1 - i forces code i.

    The inverse of the cumulative distribution, in which codes stand by descending logit, lowest index first on ties.
    """
    ordered, index = torch.sort(filtered, descending=True, stable=True)
    cumulative = (ordered - ordered[..., :1]).exp().cumsum(-1)
    place = (cumulative <= uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(-1, keepdim=True)
    last = (ordered > -INFINITE).sum(-1, keepdim=True) - 1  # rounding must not lead beyond it
    drawn = index.gather(-1, place.minimum(last)).squeeze(-1)
    return torch.where(uniform < 0, -1 - uniform.long(), drawn)


def mix(filtered: Tensor, gumbel: Tensor, progress: float) -> Tensor:
    """Weights of the codes [B, L, codes] in smooth sampling: sharper the later the scale, progress from 0 to 1."""
    temperature = max(0.27 * (1 - 0.95 * progress), COLDEST)
    return torch.softmax((filtered * (1 + progress) + gumbel) / temperature, dim=-1)


def teacher_inputs(quantizer: Quantizer, token_maps: Sequence[Tensor]) -> Tensor:
    """What the scales after the first see of an image with these token maps [B, h, w]: [B, L - 1, code_channels]."""
    sizes = [(int(m.shape[1]), int(m.shape[2])) for m in token_maps]
    sums = quantizer.sums([quantizer.lookup(m) for m in token_maps], sizes[-1])
    seen = [area_pool(total, size) for total, size in zip(sums, sizes[1:], strict=False)]
    return torch.cat([latent.flatten(2).transpose(1, 2) for latent in seen], dim=1)


def teacher_logits(model: VarTransformer, labels: Tensor, inputs: Tensor) -> Tensor:
    """Upstream's training forward, without guidance: logits [B, L, codes] of all scales at once.

    labels [B] (int64), inputs as `teacher_inputs` gives them; those of the first scales alone give their logits. A mask
    lets every token see its own scale and those before it.
    """
    c = model.config
    condition = model.condition(labels)
    levels = sum(c.first_token(scale) <= inputs.shape[1] for scale in range(c.levels))
    sides = torch.tensor(c.scales[:levels])
    scale_of = torch.repeat_interleave(torch.arange(levels), sides * sides)
    mask = scale_of.unsqueeze(1) >= scale_of.unsqueeze(0)  # [L, L]
    tokens = torch.cat((model.first_tokens(condition), model.word_embed(inputs)), dim=1)
    x = tokens + torch.cat([model.place(scale) for scale in range(levels)], dim=1)
    for block in model.layers:
        x = x + block.self_attention(*block.project_qkv(x, condition), condition, mask)
        x = x + block.feed_forward(x, condition)
    return model.logits(x, condition)
