"""The transformer's training forward: all scales of a batch at once, on codes that contain random mistakes.

Calls the model's own sub-layers, so it computes what the scale-by-scale reference computes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvar.core.rotary import rotary_table
from fastvar.core.schedule import ScaleSchedule
from fastvar.export.models.common.tokenizer_blocks import enlarge
from fastvar.export.models.infinity.model import Block, Conditioning, InfinityTransformer
from fastvar.export.models.infinity.tokenizer import bits_to_codes

MASKED_SCALES = 5  # the small scales share one attention call under a block-causal mask


@dataclass
class Example:
    """One batch of scales: what goes in, what should come out."""

    inputs: list[Tensor]  # of scales 1, 2, ...: the running sum on their grid [B, bits, h, w]
    targets: list[Tensor]  # of scales 0, 1, ...: bits as 0 or 1, [B, h * w, bits] float


@torch.no_grad()
def make_example(latent: Tensor, flip_rate: Tensor, schedule: ScaleSchedule, scales: int) -> Example:
    """Quantise `latent` [B, bits, h, w] with random mistakes that the next scales are asked to mend.

    A share `flip_rate` [B, 1, 1, 1] of the bits of every scale is wrong in the running sum; the targets are
    right for the sum as it is (Infinity's bitwise self-correction).
    """
    full = schedule.final
    total = torch.zeros_like(latent)
    example = Example([], [])
    for i, size in enumerate(schedule.sizes[:scales]):
        if i > 0:
            example.inputs.append(enlarge(total, size))
        positive = F.interpolate(latent - total, size=size, mode="area") > 0
        example.targets.append(positive.flatten(2).transpose(1, 2).float())
        wrong = torch.rand(positive.shape) < flip_rate
        total = total + enlarge(bits_to_codes(positive ^ wrong), full)
    return example


def random_subset(example: Example, kept: dict[int, int]) -> tuple[Example, dict[int, Tensor]]:
    """Keep `kept[i]` random tokens of scale i, per image: cheaper, and what pruning does later.

    Returns the example with flat inputs [B, bits, k, 1] at those scales, and the indices [B, k] kept.
    """
    inputs, targets, indices = list(example.inputs), list(example.targets), {}
    for i, count in kept.items():
        B, tokens, bits = targets[i].shape
        index = torch.rand(B, tokens).topk(count, dim=1, sorted=False).indices
        flat = inputs[i - 1].flatten(2)  # [B, bits, L]
        inputs[i - 1] = flat.gather(2, index.unsqueeze(1).expand(-1, bits, -1)).unsqueeze(-1)
        targets[i] = targets[i].gather(1, index.unsqueeze(-1).expand(-1, -1, bits))
        indices[i] = index
    return Example(inputs, targets), indices


class Scales:
    """Where each scale's tokens lie in the flat sequence, with their rotary tables and the mask."""

    def __init__(self, counts: list[int], head_dim: int, indices: dict[int, Tensor], schedule: ScaleSchedule) -> None:
        self.ends = torch.tensor(counts).cumsum(0).tolist()
        self.starts = [0, *self.ends[:-1]]
        self.merged = min(MASKED_SCALES, len(counts))
        level = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.max_scales = level
        small = level[: self.ends[self.merged - 1]]
        self.bias = hidden(small[:, None] < small[None, :])  # a token sees its own scale and the earlier ones
        tables = []
        for i in range(len(counts)):
            table = torch.from_numpy(rotary_table(schedule.sizes[i], schedule.rope_grid, head_dim))
            tables.append(table[:, indices[i]] if i in indices else table)
        if indices:
            B = next(iter(indices.values())).shape[0]
            tables = [t if t.dim() == 4 else t.unsqueeze(1).expand(-1, B, -1, -1) for t in tables]
        self.rotary = torch.cat(tables, dim=-2)  # [2, (B,) L, head_dim / 2]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Block-causal attention by scale, the softmax scale already in q: [B, H, L, hd] -> [B, H, L, hd]."""
        end = self.ends[self.merged - 1]
        out = [attention(q[:, :, :end], k[:, :, :end], v[:, :, :end], self.bias)]
        for start, end in zip(self.starts[self.merged :], self.ends[self.merged :], strict=True):
            out.append(attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end], None))
        return torch.cat(out, dim=2)


def hidden(mask: Tensor) -> Tensor:
    """What is added to the attention scores: a large negative number where a bool mask is True."""
    return torch.zeros(mask.shape).masked_fill(mask, -1e4)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """By matrix products: the backward pass of torch's fused attention takes ten times as long on CPUs, measured."""
    scores = q @ k.transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1).to(v.dtype) @ v


def run_block(block: Block, x: Tensor, conditioning: Conditioning, scales: Scales, text_bias: Tensor) -> Tensor:
    """One block on the residual stream of all scales, [B, L, C]."""
    q, k, v = block.project_qkv(x, conditioning.modulation, scales.rotary)
    gate = block.modulation(conditioning.modulation)[0]
    attended = scales.attend(q.to(v.dtype), k.to(v.dtype), v)
    x = x + gate * block.sa.proj(attended.transpose(1, 2).flatten(2))
    text_k, text_v = block.ca.text_kv(conditioning.text)
    q = block.ca.mat_q(block.ca_norm(x)).unflatten(-1, (block.ca.heads, -1)).transpose(1, 2)  # [B, H, L, hd]
    attended = attention(q * block.ca.head_dim**-0.5, text_k, text_v, text_bias)
    x = x + block.ca.proj(attended.transpose(1, 2).flatten(2))
    return x + block.feed_forward(x, conditioning.modulation)


RunBlock = Callable[[Block, Tensor, Conditioning, Scales, Tensor], Tensor]


def all_logits(
    model: InfinityTransformer,
    features: Tensor,
    mask: Tensor,
    example: Example,
    schedule: ScaleSchedule,
    indices: dict[int, Tensor] | None = None,
    block: RunBlock = run_block,
) -> tuple[Tensor, Scales]:
    """Text features [B, T, Ct] with mask [B, T], and an example -> logits [B, L, 2 * bits] of all its scales.

    block: `run_block`, or what a compiler has made of it.
    """
    indices = indices or {}
    conditioning = model.conditioning(features, mask)
    scales = Scales([t.shape[1] for t in example.targets], model.config.head_dim, indices, schedule)
    tokens = [model.first_tokens(conditioning.sos), *(model.embed(codes) for codes in example.inputs)]
    x = torch.cat(tokens, dim=1) + model.lvl_embed(scales.max_scales)
    text_bias = hidden(~mask[:, None, None, :])
    for layer in model.layers:
        x = block(layer, x, conditioning, scales, text_bias)
    return model.logits(x, conditioning.sos), scales


def bit_losses(logits: Tensor, scales: Scales, example: Example) -> list[Tensor]:
    """Mean cross-entropy per bit, one scalar per scale; two logits a bit, so their difference decides."""
    pair = logits.float().unflatten(-1, (-1, 2))
    one = pair[..., 1] - pair[..., 0]  # [B, L, bits]
    return [
        F.binary_cross_entropy_with_logits(one[:, start:end], target)
        for start, end, target in zip(scales.starts, scales.ends, example.targets, strict=True)
    ]
