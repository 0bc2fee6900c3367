"""Infinity's image tokenizer in torch: a convolutional encoder and decoder around multi-scale
binary-spherical codes.

Module names follow the official checkpoint keys (upstream: infinity/models/bsq_vae). No attention anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..families.infinity import ImageTokenizerConfig
from .tensor_shapes import count, dims


class Conv(nn.Module):
    """A convolution under the key `<name>.conv`, as upstream wraps it; computes in the type of its weight."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.to(self.conv.weight.dtype))
        return out


NORM_EPS = 1e-6


def norm_groups(channels: int) -> int:
    """Groups of a norm: 32, or 24 where the channels divide by 24 and not by 32."""
    return 32 if channels % 32 == 0 else 24


class GroupNorm(nn.Module):
    """Over `norm_groups` groups of channels.

    x keeps its type up to the affine part, which is fp32: so compilers store no fp32 copy of x.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups(channels), channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        norm, channels = self.norm, (1, -1, 1, 1)
        normed = F.group_norm(x, norm.num_groups, eps=norm.eps)
        return normed.float() * norm.weight.float().view(channels) + norm.bias.float().view(channels)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(inputs), Conv(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(outputs), Conv(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = Conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Downsample(nn.Module):
    """Pads right and bottom by one, then a 3x3 convolution of stride 2 without padding."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """Residual blocks at one resolution, and the step to the next one."""

    downsample: Downsample | None
    upsample: Upsample | None

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.downsample = self.upsample = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for step in (self.downsample, self.upsample):
            x = x if step is None else step(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResidualBlock(channels, channels), ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.block_1(x))
        return out


class Encoder(nn.Module):
    """Image [B, 3, H, W] in [-1, 1] -> latent [B, bits, H / patch, W / patch], before quantisation."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        channels = (config.base_channels, *config.level_channels)
        self.conv_in = Conv(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            level = Level(inputs, outputs, config.residual_blocks)
            if i < len(config.level_channels) - 1:
                level.downsample = Downsample(outputs)
            self.down.append(level)
        self.mid = Middle(channels[-1])
        self.norm_out = GroupNorm(channels[-1])
        self.conv_out = Conv(channels[-1], config.bits, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """Summed codes [B, bits, h, w] -> image [B, 3, h * patch, w * patch], not yet clamped to [-1, 1]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        channels = config.level_channels
        self.conv_in = Conv(config.bits, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1])
        levels: list[Level] = []
        for i in reversed(range(len(channels))):
            level = Level(channels[min(i + 1, len(channels) - 1)], channels[i], config.residual_blocks + 1)
            if i > 0:
                level.upsample = Upsample(channels[i])
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = GroupNorm(channels[0])
        self.conv_out = Conv(channels[0], 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        h = self.mid(self.conv_in(codes))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class ImageTokenizer(nn.Module):
    """Encoder, decoder, and residual quantisation to one bit per channel and scale."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def decode(self, codes: Tensor) -> Tensor:
        """Summed codes [B, bits, h, w] -> image [B, 3, H, W] clamped to [-1, 1]."""
        out: Tensor = self.decoder(codes)
        return out.clamp(-1, 1)

    def quantize(self, latent: Tensor, grid_sizes: list[tuple[int, int]]) -> tuple[list[Tensor], Tensor]:
        """Residual quantisation, coarse to fine.

        Args:
            latent: encoder output [B, bits, h, w].
            grid_sizes: (h, w) of every scale; the last is the latent's own size.

        Returns:
            per scale the bits [B, h, w, bits] (bool), and the quantised sum [B, bits, h, w].
        """
        full = (latent.shape[-2], latent.shape[-1])
        total = torch.zeros_like(latent)
        bits: list[Tensor] = []
        for size in grid_sizes:
            residual = latent - total
            if size != full:
                residual = F.interpolate(residual, size=size, mode="area")
            positive = residual > 0
            bits.append(positive.permute(0, 2, 3, 1))
            total = total + enlarge(bits_to_codes(positive), full)
        return bits, total


def bits_to_codes(bits: Tensor, channel_dim: int = 1) -> Tensor:
    """Bit b -> (2b - 1) / sqrt(d): unit length over the d bits, so that a code lies on the sphere."""
    return (bits.float() * 2 - 1) / bits.shape[channel_dim] ** 0.5


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of [B, C, h, w] without corner alignment; the identity at equal size."""
    if (x.shape[-2], x.shape[-1]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def infer_image_tokenizer(shapes: Mapping[str, tuple[int, ...]]) -> ImageTokenizerConfig:
    """Sizes of an image tokenizer from its tensors alone.

    Read off the decoder: each of its levels has one residual block more, so none is ever empty.

    Raises:
        CheckpointError: the tensors are not those of such a tokenizer.
    """
    kind = "an image tokenizer"
    base = dims(shapes, "encoder.conv_in.conv.weight", 4, kind)[0]
    levels = count(shapes, r"decoder\.up\.(\d+)\.", kind)
    blocks = count(shapes, r"decoder\.up\.0\.block\.(\d+)\.", kind)
    channels = [dims(shapes, f"decoder.up.{i}.block.0.conv1.conv.weight", 4, kind)[0] for i in range(levels)]
    if not channels or not base or any(c % base for c in channels):
        raise CheckpointError(
            f"not {kind}: levels of {channels} channels over {base} base channels", expected="whole multiples"
        )
    return ImageTokenizerConfig(
        bits=dims(shapes, "encoder.conv_out.conv.weight", 4, kind)[0],
        base_channels=base,
        channel_multipliers=tuple(c // base for c in channels),
        residual_blocks=blocks - 1,
    )
