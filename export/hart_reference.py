"""A whole HART generation in eager torch: the oracle that chained engines are compared with. Clear before fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import PlanError
from ..families.hart import guidance_ratio, top_k
from ..plan import GenerationPlan, StepPlan, part_counts
from ..schedule import Size
from .hart import Block, Condition, HartTransformer, context_rotary, image_rotary
from .hart_diffusion import StepTrace, diffusion_steps, residual_of, sample
from .pruning import LayerState, gather, restore, select
from .var_reference import Shape, draw, filter_logits, guide, mix
from .vq_tokenizer import VqTokenizer, area_pool

SUB_LAYERS = ("sa", "ffn")


@dataclass(frozen=True)
class Prompt:
    """The text of B images as the text encoder gives it. Padding is part of it: attention sees it."""

    features: Tensor  # [B, Nc, Ct]
    mask: Tensor  # [B, Nc] bool, True where a token counts
    positions: Tensor  # [B, Nc] rotary positions: the number of counted tokens so far, less one


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; the defaults are upstream's sampling script's."""

    guidance_scale: float = 4.5
    top_p: float = 0.0  # 0: off
    smooth: bool = True  # a mixture of codes (Gumbel) in place of one
    residual: bool = True  # the diffusion head's, on the final scale (upstream: final_stage = 0)
    final_iterations: int = 1  # passes over parts of the final scale


@dataclass(frozen=True)
class Draws:
    """All randomness, by the pass: a scale's number, counted on where the final scale takes several passes."""

    codes: Callable[[int, Shape], Tensor]  # (pass, (B, L)) -> uniform [0, 1); -1 - i forces code i
    gumbel: Callable[[int, Shape], Tensor] | None = None  # (pass, (B, L, V)); for smooth sampling
    mixture: Callable[[int], Tensor | None] = lambda _: None  # pass -> mixture [B, L, Cv] to use in place of the drawn
    diffusion: Callable[[int, Shape], Tensor] | None = None  # (pass, (steps, B * L, Cv)) -> normal
    order: Tensor | None = None  # [B, L of the final scale] permutation; for several final iterations


@dataclass
class PassTrace:
    """What one pass through the blocks did, for comparison. R counts rows: B conditional, then B unconditional."""

    index: int
    step: StepPlan
    block_in: Tensor  # [R, L, C]
    layer_out: list[Tensor]  # per layer [R, L, C]
    logits: Tensor  # [B, L, V] guided, not filtered
    codes: Tensor  # [B, L]
    mixture: Tensor | None  # [B, L, Cv] drawn in smooth sampling
    states: list[LayerState]
    tokens: Tensor | None  # [B, L] which of the final scale's tokens these are; None: all
    diffusion_rows: Tensor | None = None  # [R * L, C] the diffusion head's condition
    diffusion: list[StepTrace] = field(default_factory=list)
    summed: Tensor | None = None  # [B, Cv, H, W] behind the scale's last pass

    @property
    def residual(self) -> Tensor:
        """[B * L, Cv], what the diffusion head added."""
        return residual_of(self.diffusion[-1].x_out)


@dataclass
class Generation:
    """What does not change from pass to pass."""

    model: HartTransformer
    tokenizer: VqTokenizer
    plan: GenerationPlan
    draws: Draws
    sampling: Sampling
    batch: int
    states: list[LayerState]

    @property
    def scales(self) -> int:
        return len(self.plan.schedule)

    def ratio(self, step: StepPlan) -> float:
        return guidance_ratio(step.index, self.scales)


def generate_scales(
    model: HartTransformer,
    tokenizer: VqTokenizer,
    prompt: Prompt,
    plan: GenerationPlan,
    draws: Draws,
    sampling: Sampling,
    guided: bool = True,
) -> Iterator[PassTrace]:
    """Run every scale of a plan; without guidance, on conditional rows alone.

    Raises:
        PlanError: a plan that skips the final scale, where the residual is drawn.
    """
    if plan.steps[-1].index != len(plan.schedule) - 1:
        raise PlanError("the policy skips HART's final scale, whose tokens are the image's detail")
    batch = prompt.features.shape[0]
    run = Generation(model, tokenizer, plan, draws, sampling, batch, [LayerState() for _ in model.blocks])
    condition = condition_rows(model, prompt, guided)
    tokens = condition.context
    summed = torch.zeros(batch, model.config.code_channels, *plan.schedule.final)
    for step in plan.steps:
        if not step.guided and len(tokens) > batch:
            condition, tokens = conditional_only(condition, tokens, run.states, batch)
        block_in = tokens + model.level(step.index)
        if step.next_index is None:
            yield from final_passes(run, step, condition, block_in, summed)
            return
        trace, embedded = run_pass(run, step, step.index, condition, block_in, None)
        grid = as_grid(embedded, step.size)
        summed = summed + tokenizer.quantize.contribution(grid, step.index, run.scales, plan.schedule.final)
        trace.summed = summed
        yield trace
        pooled = area_pool(summed, plan.schedule.sizes[step.next_index])
        tokens = model.embed(pooled).repeat(len(tokens) // batch, 1, 1)


def final_passes(
    run: Generation, step: StepPlan, condition: Condition, block_in: Tensor, summed: Tensor
) -> Iterator[PassTrace]:
    """The final scale: its tokens are added as they are, no phi, each with what the diffusion head draws."""
    embedded = torch.zeros(run.batch, step.tokens, run.model.config.code_channels)
    parts = iteration_tokens(run, step)
    for n, part in enumerate(parts):
        tokens_in = block_in if part is None else gather(block_in, part.repeat(len(block_in) // run.batch, 1))
        trace, own = run_pass(run, step, step.index + n, condition, tokens_in, part)
        if run.sampling.residual:
            draw_residual(run, trace)
            own = own + trace.residual.view_as(own)
        embedded = own if part is None else embedded.scatter(1, part.unsqueeze(-1).expand_as(own), own)
        if n == len(parts) - 1:
            trace.summed = summed + as_grid(embedded, step.size)
        yield trace


def iteration_tokens(run: Generation, step: StepPlan) -> list[Tensor | None]:
    """Which tokens [B, L] each iteration runs, in raster order; one iteration runs them all."""
    if run.sampling.final_iterations == 1:
        return [None]
    assert run.draws.order is not None
    parts: list[Tensor | None] = []
    masked = step.tokens
    for count in part_counts(step.tokens, run.sampling.final_iterations):
        masked -= count
        parts.append(run.draws.order[:, masked : masked + count].sort(dim=1).values)
    return parts


def run_pass(
    run: Generation, step: StepPlan, index: int, condition: Condition, block_in: Tensor, tokens: Tensor | None
) -> tuple[PassTrace, Tensor]:
    """All blocks, then codes and their embeddings [B, L, Cv]. Scale 0 draws from its last token alone."""
    layer_out = run_layers(run, step, condition, block_in, tokens)
    drawing = layer_out[-1][:, -1:] if step.index == 0 else layer_out[-1]
    strength = run.sampling.guidance_scale * run.ratio(step)
    logits = guide(run.model.logits(drawing, condition), run.batch, strength)
    filtered = filter_logits(logits, top_k(step.index), run.sampling.top_p)
    codes = draw(filtered, run.draws.codes(index, logits.shape[:2]))
    trace = PassTrace(index, step, block_in, layer_out, logits, codes, None, run.states, tokens)
    if not run.sampling.smooth:
        return trace, run.tokenizer.quantize.embedding(codes)
    assert run.draws.gumbel is not None
    gumbel = run.draws.gumbel(index, logits.shape)
    trace.mixture = mix(filtered, gumbel, run.ratio(step)) @ run.tokenizer.quantize.embedding.weight
    forced = run.draws.mixture(index)
    return trace, trace.mixture if forced is None else forced


def run_layers(run: Generation, step: StepPlan, condition: Condition, x: Tensor, tokens: Tensor | None) -> list[Tensor]:
    """All blocks: the outputs of every layer. A pass over part of a scale is not pruned, nor is scale 0."""
    head_dim, final = run.model.config.head_dim, run.plan.schedule.final
    if step.index == 0:
        rotary = context_rotary(condition.positions, head_dim)
    else:
        rotary = image_rotary(step.size, final, condition.offset, head_dim)
    if tokens is not None:
        rotary = rotary_of(rotary, tokens.repeat(len(x) // run.batch, 1))
    whole = tokens is None and step.index > 0
    outputs = []
    for i, (block, state) in enumerate(zip(run.model.layers, run.states, strict=True)):
        pruned_layer = run.plan.policy.prunes(i) and whole
        x = run_block(block, x, condition, rotary, step, run.plan, state, pruned_layer)
        outputs.append(x)
    return outputs


def run_block(
    block: Block,
    x: Tensor,
    condition: Condition,
    rotary: Tensor,
    step: StepPlan,
    plan: GenerationPlan,
    state: LayerState,
    pruned_layer: bool,
) -> Tensor:
    """One block on the residual stream x [R, L, C], pruned or not; updates the layer's state."""
    modulation = block.modulation(condition.pooled)
    sub_layers: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "sa": lambda tokens, places: _self_attention(block, tokens, modulation, places, state),
        "ffn": lambda tokens, _: block.feed_forward(tokens, modulation),
    }
    for name, sub_layer in sub_layers.items():
        if pruned_layer and step.kept < x.shape[1]:
            assert plan.cached_size is not None
            shared = plan.policy.shared_selection and name != "sa"
            kept = state.kept["sa"] if shared else select(x, step.kept)
            fresh = sub_layer(gather(x, kept), rotary_of(rotary, kept))
            out = restore(fresh, kept, state.outputs[name], plan.cached_size, step.size)
            state.kept[name] = kept
        else:
            out = sub_layer(x, rotary)
        if step.fills_cache and pruned_layer:
            state.outputs[name] = out
        x = x + out
    return x


def _self_attention(
    block: Block, tokens: Tensor, modulation: Tensor | None, rotary: Tensor, state: LayerState
) -> Tensor:
    q, k, v = block.project_qkv(tokens, modulation, rotary)
    if state.keys is not None and state.values is not None:
        k, v = torch.cat((state.keys, k), dim=2), torch.cat((state.values, v), dim=2)
    state.keys, state.values = k, v
    return block.self_attention(q, k, v, modulation)


def draw_residual(run: Generation, trace: PassTrace) -> None:
    """The diffusion head, conditioned on the last block and on the drawn codes: those also where codes are mixed."""
    assert run.draws.diffusion is not None
    x = trace.layer_out[-1]
    embedded = run.tokenizer.quantize.embedding(trace.codes).repeat(len(x) // run.batch, 1, 1)
    rows = run.model.diffusion_condition(x, embedded)
    steps = diffusion_steps(run.model.config.diffusion_steps)
    shape = (len(steps), trace.codes.numel(), run.model.config.code_channels)
    guidance = run.sampling.guidance_scale * run.ratio(trace.step) if len(x) > run.batch else None
    noise = run.draws.diffusion(trace.index, shape)
    trace.diffusion_rows = rows
    trace.diffusion = list(sample(run.model.diffloss.net, rows, guidance, noise, steps))


def condition_rows(model: HartTransformer, prompt: Prompt, guided: bool) -> Condition:
    """Conditional rows, then with guidance unconditional ones: features of zero, all at position 0, of length one."""
    features, mask, positions = prompt.features, prompt.mask, prompt.positions
    if guided:
        first = torch.zeros_like(mask)
        first[:, 0] = True
        features = torch.cat((features, torch.zeros_like(features)))
        mask = torch.cat((mask, first))
        positions = torch.cat((positions, torch.zeros_like(positions)))
    return model.condition(features, mask, positions)


def conditional_only(
    condition: Condition, tokens: Tensor, states: list[LayerState], batch: int
) -> tuple[Condition, Tensor]:
    """Guidance is switched off: what the unconditional rows knew and remembers goes."""
    for state in states:
        assert state.keys is not None
        assert state.values is not None
        state.keys, state.values = state.keys[:batch], state.values[:batch]
        state.outputs = {name: out[:batch] for name, out in state.outputs.items()}
    pooled = None if condition.pooled is None else condition.pooled[:batch]
    only = Condition(condition.context[:batch], condition.positions[:batch], condition.head[:, :batch], pooled)
    return only, tokens[:batch]


def rotary_of(rotary: Tensor, tokens: Tensor) -> Tensor:
    """Cosines and sines [2, R, L, hd] of the tokens [R, k]: [2, R, k, hd]."""
    return torch.stack([gather(part, tokens) for part in rotary])


def as_grid(embedded: Tensor, size: Size) -> Tensor:
    """[B, h * w, Cv] -> [B, Cv, h, w]."""
    return embedded.transpose(1, 2).unflatten(2, size)
