"""A linear map from summed codes to colour, fitted to the decoder, for previews between scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.common.tokenizer_blocks import enlarge

GRID = 8
SAMPLES = 12


def fit_preview(decoder: Callable[[Tensor], Tensor], bits: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Least squares over random multi-scale codes: weight [3, bits] and bias [3], colour in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.zeros(SAMPLES, bits, GRID, GRID)
    for size in (1, 2, 4, GRID):
        random_bits = torch.randint(0, 2, (SAMPLES, bits, size, size), generator=generator).float()
        codes = codes + enlarge((random_bits * 2 - 1) / bits**0.5, (GRID, GRID))
    with torch.no_grad():
        image = torch.cat([decoder(sample[None]) for sample in codes]).clamp(-1, 1)
    colour = F.avg_pool2d(image, patch_size)  # [samples, 3, GRID, GRID]
    inputs = torch.cat((codes, torch.ones(SAMPLES, 1, GRID, GRID)), dim=1).transpose(0, 1).flatten(1).t()
    solution = torch.linalg.lstsq(inputs.double(), colour.transpose(0, 1).flatten(1).t().double()).solution.float()
    return solution[:-1].t().contiguous(), solution[-1].contiguous()
