"""A whole generation in eager torch: the oracle that chained engines are compared with. Clear before fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import GenerationPlan, StepPlan
from ..rotary import rotary_table
from .image_tokenizer import bits_to_codes, enlarge
from .infinity import Condition, InfinityTransformer
from .pruning import LayerState, ScaleRun, run_block

Noise = Callable[[int, tuple[int, int]], Tensor]  # (scale index, (L, bits a token)) -> uniform [0, 1)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one image; the defaults are upstream's."""

    guidance_scale: float = 3.0
    tau: float = 1.0  # temperature
    top_p: float = 0.97  # 0: off


@dataclass
class ScaleTrace:
    """What one scale did, for comparison. B counts guidance rows."""

    step: StepPlan
    block_in: Tensor  # [B, L, C], before the level embedding
    layer_out: list[Tensor]  # per layer [B, L, C]
    logits: Tensor  # [L, 2 * code_channels], guided, after division by tau
    bits: Tensor  # [L, code_channels] bool
    summed_codes: Tensor  # [1, bits, H, W]
    states: list[LayerState]


def generate_scales(
    model: InfinityTransformer,
    features: Tensor,
    mask: Tensor,
    plan: GenerationPlan,
    noise: Noise,
    sampling: Sampling,
) -> Iterator[ScaleTrace]:
    """Run every scale of a plan.

    Args:
        features: text features [B, T, Ct]; row 0 conditional, row 1 (if any) unconditional.
        mask: [B, T] bool, True where a token counts.
        noise: uniform numbers; -1 forces a bit to one and 2 to zero (teacher forcing).
    """
    condition = model.condition(features, mask)
    patch = model.config.patch
    final = (plan.schedule.final[0] * patch, plan.schedule.final[1] * patch)
    states = [LayerState() for _ in model.layers]
    block_in = model.first_tokens(condition.sos)
    summed = torch.zeros(1, model.config.bits, *final)
    for step in plan.steps:
        if not step.guided and len(block_in) > 1:
            condition, block_in = conditional_only(condition, block_in, states)
        layer_out = run_layers(model, block_in, condition, plan, step, states)
        logits = guide(model.logits(layer_out[-1], condition.sos), sampling)
        bits = sample_bits(logits, noise(step.index, (step.tokens, model.config.code_channels)), sampling.top_p)
        summed = summed + enlarge(codes_grid(bits, step.size, patch), final)
        yield ScaleTrace(step, block_in, layer_out, logits, bits, summed, states)
        if step.next_index is not None:
            block_in = next_tokens(model, summed, plan.schedule.sizes[step.next_index])
            block_in = block_in.expand(layer_out[-1].shape[0], -1, -1)


def conditional_only(condition: Condition, block_in: Tensor, states: list[LayerState]) -> tuple[Condition, Tensor]:
    """Guidance is switched off: what the unconditional row knew and remembers goes."""
    for state in states:
        assert state.keys is not None
        assert state.values is not None
        state.keys, state.values = state.keys[:1], state.values[:1]
        state.outputs = {name: out[:1] for name, out in state.outputs.items()}
    mask = None if condition.text_mask is None else condition.text_mask[:1]
    only = Condition(condition.sos[:1], condition.text[:1], mask, condition.modulation[:1])
    return only, block_in[:1]


def run_layers(
    model: InfinityTransformer,
    block_in: Tensor,
    condition: Condition,
    plan: GenerationPlan,
    step: StepPlan,
    states: list[LayerState],
) -> list[Tensor]:
    """All blocks of one scale: the outputs of every layer."""
    shared = plan.policy.shared_selection
    table = rotary_table(step.size, plan.schedule.position_grid, model.config.head_dim)
    run = ScaleRun(step.size, step.kept, torch.from_numpy(table), plan.cached_size, step.fills_cache, shared)
    x = block_in + model.lvl_embed.weight[step.index]
    outputs = []
    for i, (block, state) in enumerate(zip(model.layers, states, strict=True)):
        x = run_block(block, x, condition, run, state, plan.policy.prunes(i))
        outputs.append(x)
    return outputs


def guide(logits: Tensor, sampling: Sampling) -> Tensor:
    """[B, L, n] -> [L, n]: temperature first, then classifier-free guidance on the logits."""
    logits = logits / sampling.tau
    if logits.shape[0] == 1:
        return logits[0]
    scale = sampling.guidance_scale
    return scale * logits[0] + (1 - scale) * logits[1]


def sample_bits(logits: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Two logits a bit [L, 2d], uniform [L, d] -> bits [L, d]: one where u < P(one).

    The rarer value goes when its probability is at most 1 - top_p: top-p on two classes; 0, as 1, is off.
    """
    pair = logits.unflatten(-1, (-1, 2))
    one = torch.sigmoid(pair[..., 1] - pair[..., 0])
    cut = 1 - (top_p or 1)
    one = torch.where(one <= cut, 0.0, torch.where(1 - one <= cut, 1.0, one))
    return uniform < one


def codes_grid(bits: Tensor, size: tuple[int, int], patch: int) -> Tensor:
    """Bits [L, channels] -> codes [1, bits, h * patch, w * patch] on the tokenizer's grid."""
    grid = bits.transpose(0, 1).reshape(1, -1, *size)
    return bits_to_codes(F.pixel_shuffle(grid.float(), patch))


def next_tokens(model: InfinityTransformer, summed: Tensor, size: tuple[int, int]) -> Tensor:
    """The running sum resized (bilinear, not area) to the next scale and embedded: [1, L, C]."""
    patch = model.config.patch
    resized = enlarge(summed, (size[0] * patch, size[1] * patch))
    return model.embed(F.pixel_unshuffle(resized, patch))
