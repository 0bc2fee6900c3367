"""A linear map from summed codes to colour, fitted to the decoder, for previews between scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 8
AREAS = 4  # along a side, each of one code
AGREEING = 5  # scales that add up to it
SAMPLES = 12


def fit_preview(decoder: Callable[[Tensor], Tensor], bits: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Least squares over random codes: weight [3, bits] and bias [3], colour in [-1, 1].

    The codes are those of even areas, where scales agree. Others decode to grey, and so would previews.
    """
    generator = torch.Generator().manual_seed(0)
    random_bits = torch.randint(0, 2, (SAMPLES, bits, AREAS, AREAS), generator=generator).float()
    codes = F.interpolate((random_bits * 2 - 1) * AGREEING / bits**0.5, size=(GRID, GRID))
    with torch.no_grad():
        image = torch.cat([decoder(sample[None]) for sample in codes]).clamp(-1, 1)
    colour = F.avg_pool2d(image, patch_size)  # [samples, 3, GRID, GRID]
    inputs = torch.cat((codes, torch.ones(SAMPLES, 1, GRID, GRID)), dim=1).transpose(0, 1).flatten(1).t()
    solution = torch.linalg.lstsq(inputs.double(), colour.transpose(0, 1).flatten(1).t().double()).solution.float()
    return solution[:-1].t().contiguous(), solution[-1].contiguous()
