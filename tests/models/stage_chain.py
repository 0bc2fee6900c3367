"""A tiled image decoder in plain torch: every stage over every stripe, on activations that are kept whole."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvar.export.models.common.decoder_stages import HALO, ConvIn, StagePlan, Tiling, decoder_stages
from fastvar.export.models.infinity.tokenizer import Decoder
from fastvar.families.infinity import ImageTokenizerConfig

NAN = float("nan")


def tiled(model: Decoder, config: ImageTokenizerConfig, summed: Tensor, tile: int) -> Tensor:
    """Every stage over every stripe, on padded activations whose spare rows are not numbers."""
    tiling = Tiling(summed.shape[2], tile)
    stream = inner = torch.empty(0)
    statistics = torch.empty(0)
    for plan in decoder_stages(config):
        rows, found, name = run_stage(model, plan, tiling, summed, stream, inner, statistics)
        statistics = torch.stack(found) if found[0].ndim == 2 else found[0]
        if name == "inner_stripe_out":
            inner = padded(rows)
        else:
            stream = padded(rows)
    return stream[HALO:-HALO].transpose(0, 1)[None]


def run_stage(
    model: Decoder, plan: StagePlan, tiling: Tiling, summed: Tensor, stream: Tensor, inner: Tensor, statistics: Tensor
) -> tuple[Tensor, list[Tensor], str]:
    prefix = f"{plan.layer}." if plan.layer else ""
    written, found, first = [], [], 0
    latent = (tiling.height,) if plan.factory is ConvIn else tiling.stripes
    for number, rows in enumerate(latent):
        stage = plan.factory(**plan.arguments(rows, summed.shape[3], tiling))
        last = first + stage.rows
        given = {
            "summed": summed,
            "stripe": stream[first : last + 2 * HALO],
            "inner_stripe": inner[first : last + 2 * HALO],
            "residual": stream[first + HALO : last + HALO],
            "above": torch.tensor([float(number > 0)]),
            "below": torch.tensor([float(number < len(latent) - 1)]),
            "statistics": statistics,
        }
        state = model.state_dict()
        weights = {name: state[prefix + name] for name in stage.weights}
        inputs = {name: given[name] for name in stage.inputs}
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        assert shapes == stage.input_shapes()
        results = stage(*inputs.values(), weights=weights)
        written.append(results[0] if isinstance(results, tuple) else results)
        found.append(results[1] if isinstance(results, tuple) else torch.empty(0))
        first = last
    return torch.cat(written), found, stage.outputs[0]


def padded(rows: Tensor) -> Tensor:
    spare = torch.full_like(rows[:HALO], NAN)
    return torch.cat((spare, rows, spare))
