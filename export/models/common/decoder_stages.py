"""The image decoder, cut into stages at the input of every norm; a stage runs on one stripe of rows at a time.

The result is exact. A norm needs the statistics of all rows: each stripe writes its own, the next stage merges them.
Activations are stored as rows [H, C, W], so that a stripe with its neighbouring rows is a range of bytes. The first and
the last stripe read a spare row beyond the image, which may hold anything. The runtime says where stripes lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.dtypes import size_bytes
from ....core.schedule import Size
from ....families.base import ImageTokenizerShape
from .rows import Shapes, Weights
from .steps import Step
from .tokenizer_blocks import NORM_EPS, norm_groups
from .weights import affine

HALO = 1  # rows that a convolution sees beyond its stripe, on either side


@dataclass(frozen=True)
class Tiling:
    """Latent rows in stripes of `rows`; the last one is shorter where they do not divide `height`."""

    height: int
    rows: int

    @property
    def stripes(self) -> tuple[int, ...]:
        """Latent rows of every stripe."""
        whole, rest = divmod(self.height, self.rows)
        return (self.rows,) * whole + ((rest,) if rest else ())


class Stage(Step):
    """One stage for stripes of `rows` rows, as they are read, of an image `width` wide.

    `channels` are those read and those written. Inputs and outputs: a stripe of the residual stream [rows, C, W], which
    comes with a row above and below; the same of the activation inside a residual block ("inner"); "above" and "below"
    [1], which are 1 where the image goes on there and 0 where it ends; statistics [stripes, 2, groups] of the whole
    activation in, [2, groups] of the stripe out: mean and biased variance, fp32. Weights go by their official names.
    """

    label: ClassVar[str]  # in the names of engines
    inputs: tuple[str, ...] = ("stripe", "above", "below", "statistics")
    outputs: tuple[str, ...] = ("stripe_out", "statistics_out")
    weights: tuple[str, ...] = ()

    def __init__(self, channels: tuple[int, int], rows: int, width: int, tiling: Tiling) -> None:
        super().__init__()
        self.channels, self.rows, self.width, self.tiling = channels, rows, width, tiling

    def border(self) -> Shapes:
        read, written = self.channels
        rows_out = (self.rows, written, self.width)
        return {
            **dict.fromkeys(("stripe", "inner_stripe"), (self.rows + 2 * HALO, read, self.width)),
            **dict.fromkeys(("above", "below"), (1,)),
            "statistics": (len(self.tiling.stripes), 2, norm_groups(read)),
            **dict.fromkeys(("residual", "stripe_out", "inner_stripe_out", "image"), rows_out),
            "statistics_out": (2, norm_groups(written)),
        }

    def inside(self, x: Tensor, above: Tensor, below: Tensor) -> Tensor:
        """x [rows + 2, C, W] with zeros for rows beyond the image: there a convolution is padded."""
        inside = torch.cat((above, torch.ones(self.rows), below)).view(-1, 1, 1)
        return torch.where(inside > 0, x, 0.0)

    def normed(self, x: Tensor, statistics: Tensor, weights: Weights, name: str) -> Tensor:
        """Group norm of x [n, C, W] by statistics of the whole activation, then SiLU, in fp32."""
        channels = x.shape[1]
        means, variances = statistics.unbind(1)
        moments = merged(means, variances, torch.tensor(self.tiling.stripes) / self.tiling.height)
        mean, variance = (m.view(-1, 1).expand(-1, channels // m.numel()).reshape(-1, 1) for m in moments)
        scale = torch.rsqrt(variance + NORM_EPS) * weights[f"{name}.norm.weight"].view(-1, 1)
        return F.silu((x.float() - mean) * scale + weights[f"{name}.norm.bias"].view(-1, 1))


class ConvIn(Stage):
    """Summed codes [1, bits, h, w] -> residual stream [h, C, w], all rows at once: here they are small."""

    label = "conv-in"
    inputs = ("summed",)
    weights = affine("conv_in.conv")

    def border(self) -> Shapes:
        groups = (len(self.tiling.stripes), 2, norm_groups(self.channels[1]))
        return {**super().border(), "summed": (1, self.channels[0], self.rows, self.width), "statistics_out": groups}

    def forward(self, summed: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        weight = weights["conv_in.conv.weight"]
        out = F.conv2d(summed.to(weight.dtype), weight, weights["conv_in.conv.bias"], padding=1)[0].transpose(0, 1)
        shares = torch.block_diag(*(torch.full((1, rows), 1 / rows) for rows in self.tiling.stripes))
        return out, statistics_of(out, shares)


class FirstConv(Stage):
    """First half of a residual block that keeps its channels: norm1, conv1."""

    label = "conv1"
    outputs: tuple[str, ...] = ("inner_stripe_out", "statistics_out")
    weights: tuple[str, ...] = affine("norm1.norm", "conv1.conv")

    def forward(
        self, stripe: Tensor, above: Tensor, below: Tensor, statistics: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        h = self.inside(self.normed(stripe, statistics, weights, "norm1"), above, below)
        out = convolved(h, weights, "conv1")
        return out, statistics_of(out)


class SecondConv(Stage):
    """Second half of a residual block that keeps its channels: norm2, conv2, and the block's input added."""

    label = "conv2"
    inputs = ("inner_stripe", "residual", "above", "below", "statistics")
    weights = affine("norm2.norm", "conv2.conv")

    def forward(
        self, inner_stripe: Tensor, residual: Tensor, above: Tensor, below: Tensor, statistics: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        h = self.inside(self.normed(inner_stripe, statistics, weights, "norm2"), above, below)
        out = residual + convolved(h, weights, "conv2")
        return out, statistics_of(out)


class ShortcutFirstConv(FirstConv):
    """First half of a block that changes its channels: conv1, and the 1x1 shortcut behind its channels.

    The block's input is not needed afterwards, so the output may take its place.
    """

    label = "conv1-shortcut"
    outputs = Stage.outputs
    weights = (*FirstConv.weights, *affine("nin_shortcut.conv"))

    def border(self) -> Shapes:
        return {**super().border(), "stripe_out": (self.rows, 2 * self.channels[1], self.width)}

    def forward(
        self, stripe: Tensor, above: Tensor, below: Tensor, statistics: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        out, found = super().forward(stripe, above, below, statistics, weights)
        weight, bias = weights["nin_shortcut.conv.weight"][:, :, 0, 0], weights["nin_shortcut.conv.bias"]
        shortcut = weight @ stripe.to(weight.dtype) + bias.view(-1, 1)  # as rows lie, so that nothing is transposed
        return torch.cat((out, shortcut[HALO:-HALO]), dim=1), found


class ShortcutSecondConv(Stage):
    """Second half of a block that changes its channels; reads twice as many as it writes."""

    label = "conv2-shortcut"
    weights = SecondConv.weights

    def border(self) -> Shapes:
        return {**super().border(), "stripe": (self.rows + 2 * HALO, 2 * self.channels[1], self.width)}

    def forward(
        self, stripe: Tensor, above: Tensor, below: Tensor, statistics: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        inner, shortcut = stripe.chunk(2, dim=1)
        h = self.inside(self.normed(inner, statistics, weights, "norm2"), above, below)
        out = shortcut[HALO:-HALO] + convolved(h, weights, "conv2")
        return out, statistics_of(out)


class UpsampleConv(Stage):
    """Nearest x2 of a stripe, then a convolution: twice the rows, twice as wide."""

    label = "upsample"
    inputs = ("stripe", "above", "below")
    weights = affine("conv.conv")

    def border(self) -> Shapes:
        return {**super().border(), "stripe_out": (2 * self.rows, self.channels[1], 2 * self.width)}

    def forward(self, stripe: Tensor, above: Tensor, below: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
        x = self.inside(stripe, above, below).transpose(0, 1)[None]
        larger = F.interpolate(x, scale_factor=2.0, mode="nearest")[0].transpose(0, 1)
        out = convolved(larger[HALO:-HALO], weights, "conv")  # of the two rows that a row beyond became, it sees one
        return out, statistics_of(out)


class ConvOut(Stage):
    """norm_out, conv_out -> rows of the image [rows, 3, W] in [-1, 1], fp32."""

    label = "conv-out"
    outputs = ("image",)
    weights = affine("norm_out.norm", "conv_out.conv")

    def forward(self, stripe: Tensor, above: Tensor, below: Tensor, statistics: Tensor, weights: Weights) -> Tensor:
        h = self.inside(self.normed(stripe, statistics, weights, "norm_out"), above, below)
        return convolved(h, weights, "conv_out").clamp(-1, 1)


def convolved(x: Tensor, weights: Weights, name: str) -> Tensor:
    """x [n + 2, C, W] -> [n, C', W] under a 3x3 kernel: a stripe brings its padding of rows along."""
    weight, bias = weights[f"{name}.conv.weight"], weights[f"{name}.conv.bias"]
    return F.conv2d(x.to(weight.dtype).transpose(0, 1)[None], weight, bias, padding=(0, 1))[0].transpose(0, 1)


def statistics_of(x: Tensor, shares: Tensor | None = None) -> Tensor:
    """Mean and biased variance [2, groups] of a stripe [n, C, W] as it is stored, or of several by the rows' shares.

    Rows come first, then their merging: compilers make one kernel of a row's mean and variance, and store no fp32 copy.
    """
    rows = x.float().reshape(x.shape[0], norm_groups(x.shape[1]), -1)
    means = rows.mean(-1)
    variances = (rows - means[..., None]).square().mean(-1)
    shares = torch.full((x.shape[0],), 1 / x.shape[0]) if shares is None else shares
    return torch.stack(merged(means, variances, shares), dim=-2)


def merged(means: Tensor, variances: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [groups] of a whole from those of its parts [parts, groups] (Chan et al., 1979).

    `shares` [parts] of the whole add up to 1; several wholes [wholes, parts] give [wholes, groups].
    """
    shares = shares[..., None]
    mean = (shares * means).sum(-2)
    return mean, (shares * (variances + (means - mean[..., None, :]).square())).sum(-2)


@dataclass(frozen=True)
class StagePlan:
    """A stage of a decoder: the layer whose weights it takes, and how many rows it has for one of the latent."""

    factory: type[Stage]
    layer: str
    channels: tuple[int, int]
    scale: int = 1

    def arguments(self, latent_rows: int, latent_width: int, tiling: Tiling) -> dict[str, object]:
        """Arguments of the factory for a stripe of that many latent rows."""
        rows, width = latent_rows * self.scale, latent_width * self.scale
        return {"channels": self.channels, "rows": rows, "width": width, "tiling": tiling}


def decoder_stages(config: ImageTokenizerShape) -> Iterator[StagePlan]:
    """All stages in order; together they compute `image_tokenizer.Decoder`."""
    channels = config.level_channels
    last, inner = len(channels) - 1, channels[-1]
    yield StagePlan(ConvIn, "", (config.code_channels, inner))
    for name in ("mid.block_1", "mid.block_2"):
        yield from _block(name, (inner, inner), 1)
    for level in reversed(range(len(channels))):
        scale, own = 1 << (last - level), channels[level]
        for number in range(config.residual_blocks + 1):
            read = channels[min(level + 1, last)] if number == 0 else own
            yield from _block(f"up.{level}.block.{number}", (read, own), scale)
        if level > 0:
            yield StagePlan(UpsampleConv, f"up.{level}.upsample", (own, own), scale)
    yield StagePlan(ConvOut, "", (channels[0], 3), 1 << last)


def _block(layer: str, channels: tuple[int, int], scale: int) -> Iterator[StagePlan]:
    read, written = channels
    keeps = read == written
    yield StagePlan(FirstConv if keeps else ShortcutFirstConv, layer, channels, scale)
    yield StagePlan(SecondConv if keeps else ShortcutSecondConv, layer, (written, written), scale)


def contiguous_bytes(config: ImageTokenizerShape, grid: Size, rows: int, dtype: str) -> Iterator[tuple[str, int]]:
    """Distances between stripes by name, in bytes: a library must accept addresses at their multiples."""
    for channels, scale in {(c, 1 << i) for i, c in enumerate(reversed(config.level_channels))}:
        width = grid[1] * scale
        yield f"a row of {channels} channels and {width} columns", size_bytes(dtype, (channels, width))
        yield f"a stripe's statistics of {channels} channels", size_bytes("float32", (2, norm_groups(channels)))
    pixels = (rows * config.patch_size, 3, grid[1] * config.patch_size)
    yield f"a stripe of {rows} latent rows as an image", size_bytes("float32", pixels)
