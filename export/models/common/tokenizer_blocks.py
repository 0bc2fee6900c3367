"""The convolutional encoder and decoder that all image tokenizers share.

Module names follow the official checkpoint keys. Infinity's program wraps each convolution and norm in a module of its
own, so that its keys have one part more ("conv1.conv.weight"); VQ tokenizers attend in the middle and at the coarsest
level. `Layers` says which of the two a tokenizer has.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ....families.base import ImageTokenizerShape
from .rows import attention

NORM_EPS = 1e-6


class Conv(nn.Conv2d):
    """A convolution in the type of its weight. It keeps the size under stride 1, and pads nothing under others."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def enlarge(x: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize of [B, C, h, w] without corner alignment, "bilinear" or "bicubic"; the identity at equal size."""
    if (x.shape[-2], x.shape[-1]) == size:
        return x
    return F.interpolate(x, size=size, mode=mode, align_corners=False)


def norm_groups(channels: int) -> int:
    """Groups of a norm: 32, or 24 where the channels divide by 24 and not by 32."""
    return 32 if channels % 32 == 0 else 24


class GroupNorm(nn.GroupNorm):
    """A norm over `norm_groups` groups of channels.

    x keeps its type up to the affine part, which is fp32: so compilers store no fp32 copy of x.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(norm_groups(channels), channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        channels = (1, -1, 1, 1)
        normed = F.group_norm(x, self.num_groups, eps=self.eps)
        return normed.float() * self.weight.float().view(channels) + self.bias.float().view(channels)


@dataclass(frozen=True)
class Layers:
    """The layers of a tokenizer: whether keys name the wrapping module, and whether the coarsest level attends."""

    wrapped: bool
    attends: bool

    def conv(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
        """A `Conv`, under the key "conv" where layers are wrapped."""
        return self._layer("conv", Conv(inputs, outputs, kernel, stride))

    def norm(self, channels: int) -> nn.Module:
        """A `GroupNorm`, under the key "norm" where layers are wrapped."""
        return self._layer("norm", GroupNorm(channels))

    def _layer(self, name: str, layer: nn.Module) -> nn.Module:
        return nn.Sequential(OrderedDict({name: layer})) if self.wrapped else layer


WRAPPED = Layers(wrapped=True, attends=False)
ATTENDING = Layers(wrapped=False, attends=True)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice; the input is added, through a 1x1 convolution where the channels change."""

    def __init__(self, inputs: int, outputs: int, layers: Layers) -> None:
        super().__init__()
        self.norm1, self.conv1 = layers.norm(inputs), layers.conv(inputs, outputs)
        self.norm2, self.conv2 = layers.norm(outputs), layers.conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = layers.conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attention(nn.Module):
    """Every grid cell attends to all of them, with a single head as wide as the channels; added to the input.

    The layout is that of rows.attention, where the images of a batch take the place of heads.
    """

    attention = staticmethod(attention)  # tracing/torch_export.py puts another form in its place

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv, self.proj_out = Conv(channels, 3 * channels, 1), Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *size = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).permute(2, 0, 1)  # [h * w, B, 3C]
        q, k, v = qkv.split(channels, dim=-1)
        out = self.attention(q * channels**-0.5, k, v, None, channels)  # [h * w * B, C]
        grid = out.view(-1, batch, channels).permute(1, 2, 0).unflatten(2, size)
        return x + self.proj_out(grid)


class Downsample(nn.Module):
    """Pads right and bottom by one, then a 3x3 convolution of stride 2 without padding."""

    def __init__(self, channels: int, layers: Layers = ATTENDING) -> None:
        super().__init__()
        self.conv = layers.conv(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int, layers: Layers) -> None:
        super().__init__()
        self.conv = layers.conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """Residual blocks at one resolution, attention behind each where it attends, and the step to the next one."""

    downsample: Downsample | None
    upsample: Upsample | None

    def __init__(self, inputs: int, outputs: int, blocks: int, layers: Layers, coarsest: bool) -> None:
        super().__init__()
        channels = (inputs, *(outputs for _ in range(blocks)))
        self.block = nn.ModuleList(ResidualBlock(*pair, layers) for pair in itertools.pairwise(channels))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(blocks if coarsest and layers.attends else 0))
        self.downsample = self.upsample = None

    def forward(self, x: Tensor) -> Tensor:
        for block, attn_mlp in itertools.zip_longest(self.block, self.attn):
            x = block(x) if attn_mlp is None else attn_mlp(block(x))
        for step in (self.downsample, self.upsample):
            x = x if step is None else step(x)
        return x


class Middle(nn.Module):
    """Two residual blocks, with attention between them where the tokenizer attends."""

    def __init__(self, channels: int, layers: Layers) -> None:
        super().__init__()
        self.block_1, self.block_2 = (ResidualBlock(channels, channels, layers) for _ in range(2))
        self.attn_1 = Attention(channels) if layers.attends else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Encoder(nn.Module):
    """Image [B, 3, H, W] in [-1, 1] -> latent [B, code_channels, H / patch, W / patch], before quantisation."""

    layers: ClassVar[Layers] = ATTENDING

    def __init__(self, config: ImageTokenizerShape) -> None:
        super().__init__()
        layers, channels = self.layers, (config.base_channels, *config.level_channels)
        last = len(config.level_channels) - 1
        self.conv_in = layers.conv(3, config.base_channels)
        self.down = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            level = Level(inputs, outputs, config.residual_blocks, layers, i == last)
            if i < last:
                level.downsample = Downsample(outputs, layers)
            self.down.append(level)
        self.mid = Middle(channels[-1], layers)
        self.norm_out = layers.norm(channels[-1])
        self.conv_out = layers.conv(channels[-1], config.code_channels)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """Latent [B, code_channels, h, w] -> image [B, 3, h * patch, w * patch], not yet clamped to [-1, 1]."""

    layers: ClassVar[Layers] = ATTENDING

    def __init__(self, config: ImageTokenizerShape) -> None:
        super().__init__()
        layers, channels = self.layers, config.level_channels
        last = len(channels) - 1
        self.conv_in = layers.conv(config.code_channels, channels[-1])
        self.mid = Middle(channels[-1], layers)
        self.up = nn.ModuleList()
        for i, outputs in enumerate(channels):
            level = Level(channels[min(i + 1, last)], outputs, config.residual_blocks + 1, layers, i == last)
            if i > 0:
                level.upsample = Upsample(outputs, layers)
            self.up.append(level)
        self.norm_out = layers.norm(channels[0])
        self.conv_out = layers.conv(channels[0], 3)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
