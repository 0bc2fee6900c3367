"""A whole generation of Infinity in eager torch (see transformer/reference_loop.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.plan import GenerationPlan, StepPlan
from ....core.rotary import rotary_table
from ....core.schedule import Size
from ..common.tokenizer_blocks import enlarge
from ..transformer.pruning import LayerState, run_blocks
from ..transformer.reference_loop import Generation, Trace
from .model import Conditioning, InfinityTransformer
from .tokenizer import bits_to_codes

Noise = Callable[[int, tuple[int, int]], Tensor]  # (scale index, (L, bits a token)) -> uniform [0, 1)


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one image; the defaults are upstream's."""

    guidance_scale: float = 3.0
    tau: float = 1.0  # temperature
    top_p: float = 0.97  # 0: off


@dataclass
class ScaleTrace(Trace):
    """What one scale did. block_in has no level embedding yet; logits [L, 2 * code_channels] are divided by tau."""

    bits: Tensor  # [L, code_channels] bool
    summed_codes: Tensor  # [1, bits, H, W]


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
    conditioning = model.conditioning(features, mask)
    tokens = model.first_tokens(conditioning.sos)
    return InfinityGeneration(model, plan, conditioning, tokens, 1, noise, sampling).run()


class InfinityGeneration(Generation[ScaleTrace]):
    """The generation of one image."""

    def scale(self, step: StepPlan) -> Iterator[ScaleTrace]:
        model = self.model
        layer_out = run_layers(model, self.tokens, self.conditioning, self.plan, step, self.states)
        logits = guide(model.logits(layer_out[-1], self.conditioning.sos), self.sampling)
        uniform = self.noise(step.index, (step.tokens, model.config.code_channels))
        bits = sample_bits(logits, uniform, self.sampling.top_p)
        self.summed = self.summed + enlarge(codes_grid(bits, step.size, self.patch), self.final)
        yield ScaleTrace(step, self.tokens, layer_out, logits, self.states, bits, self.summed)

    def following(self, size: Size) -> Tensor:
        return next_tokens(self.model, self.summed, size)


def run_layers(
    model: InfinityTransformer,
    block_in: Tensor,
    conditioning: Conditioning,
    plan: GenerationPlan,
    step: StepPlan,
    states: list[LayerState],
) -> list[Tensor]:
    """All blocks of one scale: the outputs of every layer."""
    table = torch.from_numpy(rotary_table(step.size, plan.schedule.rope_grid, model.config.head_dim))
    x = block_in + model.lvl_embed.weight[step.index]
    return run_blocks(model.layers, x, conditioning, plan, step, states, table)


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
