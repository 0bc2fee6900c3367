"""What the torch references of families with a codebook share: guidance, filters, sampling, teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tokenizer import Quantizer, area_pool

Shape = tuple[int, ...]


INFINITE = float("inf")


COLDEST = 0.005  # temperature of the smooth mixing, at least


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
    """Inputs of the scales after the first for an image with these token maps [B, h, w]: [B, L - 1, code_channels]."""
    sizes = [(int(m.shape[1]), int(m.shape[2])) for m in token_maps]
    sums = quantizer.sums([quantizer.lookup(m) for m in token_maps], sizes[-1])
    seen = [area_pool(total, size) for total, size in zip(sums, sizes[1:], strict=False)]
    return torch.cat([latent.flatten(2).transpose(1, 2) for latent in seen], dim=1)
