"""A whole generation of HART in eager torch (see transformer/reference_loop.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....core.plan import GenerationPlan, StepPlan, part_counts
from ....core.schedule import Size
from ....errors import PlanError
from ....families.hart import guidance_ratio, top_k
from ..codebook.reference import Shape, draw, filter_logits, guide, mix
from ..codebook.tokenizer import Quantizer, VqTokenizer, area_pool
from ..transformer.pruning import gather, run_blocks
from ..transformer.reference_loop import Generation, Trace
from .diffusion import StepTrace, diffusion_steps, residual_of, sample
from .model import Conditioning, HartTransformer, context_rotary, image_rotary, rotary_of


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
class PassTrace(Trace):
    """What one pass did. block_in has its level embedding."""

    index: int
    codes: Tensor  # [B, L]
    mixture: Tensor | None  # [B, L, Cv] drawn in smooth sampling
    tokens: Tensor | None  # [B, L] which of the final scale's tokens these are; None: all
    diffusion_rows: Tensor | None = None  # [R * L, C] the diffusion head's condition
    diffusion: list[StepTrace] = field(default_factory=list)
    summed: Tensor | None = None  # [B, Cv, H, W] behind the scale's last pass

    @property
    def residual(self) -> Tensor:
        """[B * L, Cv], what the diffusion head added."""
        return residual_of(self.diffusion[-1].x_out)


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
    conditioning, images = condition_rows(model, prompt, guided), len(prompt.features)
    quantizer = tokenizer.quantize
    return HartGeneration(model, plan, conditioning, conditioning.context, images, draws, sampling, quantizer).run()


@dataclass
class HartGeneration(Generation[PassTrace]):
    """The generation of a batch of images."""

    quantizer: Quantizer

    def ratio(self, step: StepPlan) -> float:
        """How far through the schedule a scale lies."""
        return guidance_ratio(step.index, len(self.plan.schedule))

    def scale(self, step: StepPlan) -> Iterator[PassTrace]:
        block_in = self.tokens + self.model.level(step.index)
        if step.next_index is None:
            yield from self.final_passes(step, block_in)
            return
        trace, embedded = self.run_pass(step, step.index, block_in, None)
        scales, grid = len(self.plan.schedule), as_grid(embedded, step.size)
        self.summed = self.summed + self.quantizer.contribution(grid, step.index, scales, self.final)
        trace.summed = self.summed
        yield trace

    def following(self, size: Size) -> Tensor:
        embedded: Tensor = self.model.embed(area_pool(self.summed, size))
        return embedded

    def final_passes(self, step: StepPlan, block_in: Tensor) -> Iterator[PassTrace]:
        """The final scale: its tokens are added as they are, no phi, each with what the diffusion head draws."""
        embedded = torch.zeros(self.images, step.tokens, self.model.config.code_channels)
        parts = self.iteration_tokens(step)
        for n, part in enumerate(parts):
            tokens_in = block_in if part is None else gather(block_in, self.of_rows(part, block_in))
            trace, own = self.run_pass(step, step.index + n, tokens_in, part)
            if self.sampling.residual:
                self.draw_residual(trace)
                own = own + trace.residual.view_as(own)
            embedded = own if part is None else embedded.scatter(1, part.unsqueeze(-1).expand_as(own), own)
            if n == len(parts) - 1:
                trace.summed = self.summed + as_grid(embedded, step.size)
            yield trace

    def iteration_tokens(self, step: StepPlan) -> list[Tensor | None]:
        """Which tokens [B, L] each iteration runs, in raster order; one iteration runs them all."""
        if self.sampling.final_iterations == 1:
            return [None]
        assert self.noise.order is not None
        parts: list[Tensor | None] = []
        masked = step.tokens
        for count in part_counts(step.tokens, self.sampling.final_iterations):
            masked -= count
            parts.append(self.noise.order[:, masked : masked + count].sort(dim=1).values)
        return parts

    def of_rows(self, part: Tensor, x: Tensor) -> Tensor:
        """Tokens [B, k] of the images as tokens of the guidance rows [R, k] of x."""
        return part.repeat(len(x) // self.images, 1)

    def run_pass(self, step: StepPlan, index: int, block_in: Tensor, tokens: Tensor | None) -> tuple[PassTrace, Tensor]:
        """All blocks, then codes and their embeddings [B, L, Cv]. Scale 0 draws from its last token alone."""
        layer_out = self.run_layers(step, block_in, tokens)
        drawing = layer_out[-1][:, -1:] if step.index == 0 else layer_out[-1]
        strength = self.sampling.guidance_scale * self.ratio(step)
        logits = guide(self.model.logits(drawing, self.conditioning), self.images, strength)
        filtered = filter_logits(logits, top_k(step.index), self.sampling.top_p)
        codes = draw(filtered, self.noise.codes(index, logits.shape[:2]))
        trace = PassTrace(step, block_in, layer_out, logits, self.states, index, codes, None, tokens)
        if not self.sampling.smooth:
            return trace, self.quantizer.embedding(codes)
        assert self.noise.gumbel is not None
        gumbel = self.noise.gumbel(index, logits.shape)
        trace.mixture = mix(filtered, gumbel, self.ratio(step)) @ self.quantizer.embedding.weight
        forced = self.noise.mixture(index)
        return trace, trace.mixture if forced is None else forced

    def run_layers(self, step: StepPlan, x: Tensor, tokens: Tensor | None) -> list[Tensor]:
        """All blocks: the outputs of every layer. A pass over part of a scale is not pruned, nor is scale 0."""
        head_dim = self.model.config.head_dim
        if step.index == 0:
            rotary = context_rotary(self.conditioning.positions, head_dim)
        else:
            rotary = image_rotary(step.size, self.final, self.conditioning.offset, head_dim)
        if tokens is not None:
            rotary = rotary_of(rotary, self.of_rows(tokens, x))
        whole = tokens is None and step.index > 0
        return run_blocks(self.model.layers, x, self.conditioning, self.plan, step, self.states, rotary, whole)

    def draw_residual(self, trace: PassTrace) -> None:
        """The diffusion head, conditioned on the last block and on the drawn codes, also where codes are mixed."""
        assert self.noise.diffusion is not None
        x = trace.layer_out[-1]
        embedded = self.quantizer.embedding(trace.codes).repeat(len(x) // self.images, 1, 1)
        trace.diffusion_rows = self.model.diffusion_condition(x, embedded)
        steps = diffusion_steps(self.model.config.diffusion_steps)
        shape = (len(steps), trace.codes.numel(), self.model.config.code_channels)
        guidance = self.sampling.guidance_scale * self.ratio(trace.step) if len(x) > self.images else None
        noise = self.noise.diffusion(trace.index, shape)
        trace.diffusion = list(sample(self.model.diffloss["net"], trace.diffusion_rows, guidance, noise, steps))


def condition_rows(model: HartTransformer, prompt: Prompt, guided: bool) -> Conditioning:
    """Conditional rows, then with guidance unconditional ones: features of zero, all at position 0, of length one."""
    features, mask, positions = prompt.features, prompt.mask, prompt.positions
    if guided:
        first = torch.zeros_like(mask)
        first[:, 0] = True
        features = torch.cat((features, torch.zeros_like(features)))
        mask = torch.cat((mask, first))
        positions = torch.cat((positions, torch.zeros_like(positions)))
    return model.conditioning(features, mask, positions)


def as_grid(embedded: Tensor, size: Size) -> Tensor:
    """[B, h * w, Cv] -> [B, Cv, h, w]."""
    return embedded.transpose(1, 2).unflatten(2, size)
