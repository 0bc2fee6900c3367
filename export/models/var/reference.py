"""A whole generation of VAR in eager torch (see transformer/reference_loop.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.plan import GenerationPlan, StepPlan
from ....core.schedule import Size
from ..codebook.reference import INFINITE, Shape, draw, filter_logits, guide, mix
from ..codebook.tokenizer import Quantizer, area_pool
from ..transformer.pruning import run_blocks
from ..transformer.reference_loop import Generation, Trace
from .model import VarTransformer


@dataclass(frozen=True)
class VarSampling:
    """Sampling settings of one generation; the defaults are those of upstream's demo."""

    guidance_scale: float = 4.0  # 0: no guidance, and no unconditional rows
    top_k: int = 900  # 0: off
    top_p: float = 0.95  # 0: off
    smooth: bool = False  # mixtures of codes in place of drawn ones ("more_smooth")


@dataclass(frozen=True)
class Noise:
    """Random numbers by scale, or numbers in their place. B counts images, S scales; a shape is asked for.

    uniform: (scale, (B, L)) -> [0, 1); -1 - i in place of a number forces code i.
    gumbel: (scale, (B, L, codes)) -> -log of exponential draws; asked for in smooth sampling alone.
    codes: (scale) -> [B, code_channels, h, w] in place of what was drawn or mixed, or None.
    """

    uniform: Callable[[int, Shape], Tensor]
    gumbel: Callable[[int, Shape], Tensor] | None = None
    codes: Callable[[int], Tensor | None] = lambda _: None


@dataclass
class ScaleTrace(Trace):
    """What one scale did. block_in has its level and position embedding."""

    kept_codes: Tensor  # [B, L, codes] bool: what top-k and top-p left
    token_map: Tensor  # [B, h, w] int64; drawn in smooth sampling too, and not used there
    mixture: Tensor | None  # [B, L, codes] weights of the codes, in smooth sampling
    codes: Tensor  # [B, code_channels, h, w], drawn or mixed, whatever was forced
    summed: Tensor  # [B, code_channels, H, W], this scale included


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
    conditioning = model.conditioning(rows)
    tokens = model.first_tokens(conditioning)
    return VarGeneration(model, plan, conditioning, tokens, len(labels), noise, sampling, quantizer).run()


@dataclass
class VarGeneration(Generation[ScaleTrace]):
    """The generation of a batch of images."""

    quantizer: Quantizer

    def scale(self, step: StepPlan) -> Iterator[ScaleTrace]:
        model, sampling, scales = self.model, self.sampling, len(self.plan.schedule)
        block_in = self.tokens + model.place(step.index)
        layer_out = run_blocks(model.layers, block_in, self.conditioning, self.plan, step, self.states, None)
        progress = step.index / max(scales - 1, 1)  # guidance grows with it, as upstream's does
        logits = guide(model.logits(layer_out[-1], self.conditioning), self.images, sampling.guidance_scale * progress)
        filtered = filter_logits(logits, sampling.top_k, sampling.top_p)
        drawn = draw(filtered, self.noise.uniform(step.index, logits.shape[:2]))
        token_map = drawn.unflatten(1, step.size)
        codes, mixture = self.quantizer.lookup(token_map), None
        if sampling.smooth:
            assert self.noise.gumbel is not None
            mixture = mix(filtered, self.noise.gumbel(step.index, logits.shape), progress)
            codes = (mixture @ self.quantizer.embedding.weight).transpose(1, 2).unflatten(2, step.size)
        forced = self.noise.codes(step.index)
        used = codes if forced is None else forced
        self.summed = self.summed + self.quantizer.contribution(used, step.index, scales, self.final)
        kept = filtered > -INFINITE
        yield ScaleTrace(step, block_in, layer_out, logits, self.states, kept, token_map, mixture, codes, self.summed)

    def following(self, size: Size) -> Tensor:
        embedded: Tensor = self.model.embed(area_pool(self.summed, size))
        return embedded


def teacher_logits(model: VarTransformer, labels: Tensor, inputs: Tensor) -> Tensor:
    """Upstream's training forward, without guidance: logits [B, L, codes] of all scales at once.

    labels [B] (int64), inputs as `teacher_inputs` gives them; those of the first scales alone give their logits. A mask
    lets every token see its own scale and those before it.
    """
    c = model.config
    conditioning = model.conditioning(labels)
    levels = sum(c.first_token(scale) <= inputs.shape[1] for scale in range(c.max_scales))
    sides = torch.tensor(c.scales[:levels])
    scale_of = torch.repeat_interleave(torch.arange(levels), sides * sides)
    mask = scale_of.unsqueeze(1) >= scale_of.unsqueeze(0)  # [L, L]
    tokens = torch.cat((model.first_tokens(conditioning), model.word_embed(inputs)), dim=1)
    x = tokens + torch.cat([model.place(scale) for scale in range(levels)], dim=1)
    for block in model.layers:
        x = x + block.self_attention(*block.project_qkv(x, conditioning), conditioning, mask)
        x = x + block.feed_forward(x, conditioning)
    return model.logits(x, conditioning)
