"""The image tokenizer of VAR and HART in torch: a convolutional encoder and decoder around a multi-scale codebook.

Module names follow the official checkpoint keys (upstream: VAR, models/vqvae.py, models/basic_vae.py and
models/quant.py). Knows nothing of transformers or sampling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from ..families.vq import NORM_GROUPS, VqTokenizerConfig, phi_index
from ..schedule import Size
from .image_tokenizer import NORM_EPS
from .rows import attention
from .tensor_shapes import count, dims

KIND = "a VQ image tokenizer"


class Conv(nn.Conv2d):
    """A convolution that keeps the size; computes in the type of its weight."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class GroupNorm(nn.GroupNorm):
    """x keeps its type up to the affine part, which is fp32 (see image_tokenizer.GroupNorm)."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        channels = (1, -1, 1, 1)
        normed = F.group_norm(x, self.num_groups, eps=self.eps)
        return normed.float() * self.weight.float().view(channels) + self.bias.float().view(channels)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(inputs), Conv(inputs, outputs)
        self.norm2, self.conv2 = GroupNorm(outputs), Conv(outputs, outputs)
        if inputs != outputs:
            self.nin_shortcut = Conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class Attention(nn.Module):
    """Every grid cell attends to all of them, with a single head as wide as the channels; added to the input.

    Laid out as rows.attention wants it, where the images of a batch take the place of heads.
    """

    attention = staticmethod(attention)  # programs.py puts another form in its place

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

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)).to(self.conv.weight.dtype))
        return out


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """Residual blocks at one resolution, attention behind each where it attends, and the step to the next one."""

    downsample: Downsample | None
    upsample: Upsample | None

    def __init__(self, inputs: int, outputs: int, blocks: int, attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(outputs) for _ in range(blocks if attends else 0))
        self.downsample = self.upsample = None

    def forward(self, x: Tensor) -> Tensor:
        for block, attend in itertools.zip_longest(self.block, self.attn):
            x = block(x) if attend is None else attend(block(x))
        for step in (self.downsample, self.upsample):
            x = x if step is None else step(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResidualBlock(channels, channels), ResidualBlock(channels, channels)
        self.attn_1 = Attention(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Encoder(nn.Module):
    """Image [B, 3, H, W] in [-1, 1] -> [B, code_channels, H / patch, W / patch]."""

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        channels = (config.base_channels, *config.level_channels)
        last = len(config.level_channels) - 1
        self.conv_in = Conv(3, config.base_channels)
        self.down = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
            level = Level(inputs, outputs, config.residual_blocks, attends=i == last)
            if i < last:
                level.downsample = Downsample(outputs)
            self.down.append(level)
        self.mid = Middle(channels[-1])
        self.norm_out = GroupNorm(channels[-1])
        self.conv_out = Conv(channels[-1], config.code_channels)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """[B, code_channels, h, w] -> image [B, 3, h * patch, w * patch], not yet clamped to [-1, 1]."""

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        channels = config.level_channels
        last = len(channels) - 1
        self.conv_in = Conv(config.code_channels, channels[-1])
        self.mid = Middle(channels[-1])
        levels: list[Level] = []
        for i in range(last + 1):
            level = Level(channels[min(i + 1, last)], channels[i], config.residual_blocks + 1, attends=i == last)
            if i > 0:
                level.upsample = Upsample(channels[i])
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out = GroupNorm(channels[0])
        self.conv_out = Conv(channels[0], 3)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class Phi(Conv):
    """(1 - ratio) x + ratio conv(x): smooths what enlarging has made of a scale's codes."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - self.ratio) + super().forward(x) * self.ratio


class PhiSet(nn.Module):
    """Holds the phi convolutions under their official key, `qresi_ls`."""

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(config.code_channels, config.phi_ratio) for _ in range(config.phis))


class Quantizer(nn.Module):
    """The codebook, and how the codes of all scales add up to a latent: coarse to fine, each by its phi.

    A token map is int64 [B, h, w], its codes [B, code_channels, h, w].
    """

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codes, config.code_channels)
        self.quant_resi = PhiSet(config)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(config.levels, config.codes))  # of use in training alone

    def lookup(self, token_map: Tensor) -> Tensor:
        out: Tensor = self.embedding(token_map)
        return out.permute(0, 3, 1, 2)

    def nearest(self, latent: Tensor) -> Tensor:
        """The token map of the codes that are nearest, by euclidean distance, to latent [B, code_channels, h, w]."""
        codebook = self.embedding.weight
        cells = latent.permute(0, 2, 3, 1)
        distance = cells.square().sum(-1, keepdim=True) + codebook.square().sum(-1) - 2 * cells @ codebook.t()
        return distance.argmin(-1)

    def contribution(self, codes: Tensor, scale: int, scales: int, final: Size) -> Tensor:
        """What the codes of scale `scale` of `scales` add to the latent [B, code_channels, *final]."""
        out: Tensor = self.quant_resi.qresi_ls[phi_index(scale, scales)](enlarge(codes, final))
        return out

    def sums(self, codes: Sequence[Tensor], final: Size) -> Iterator[Tensor]:
        """The latent after each scale, given the codes of all."""
        return itertools.accumulate(self.contribution(own, i, len(codes), final) for i, own in enumerate(codes))

    def quantize(self, latent: Tensor, grid_sizes: Sequence[Size]) -> tuple[list[Tensor], Tensor]:
        """Residual quantisation, coarse to fine.

        Args:
            latent: encoder output [B, code_channels, h, w].
            grid_sizes: (h, w) of every scale; the last is the latent's own size.

        Returns:
            per scale its token map, and the quantised sum [B, code_channels, h, w].
        """
        total, residual = torch.zeros_like(latent), latent
        token_maps: list[Tensor] = []
        for scale, size in enumerate(grid_sizes):
            token_maps.append(self.nearest(area_pool(residual, size)))
            own = self.contribution(self.lookup(token_maps[-1]), scale, len(grid_sizes), grid_sizes[-1])
            total, residual = total + own, residual - own
        return token_maps, total


class LatentDecoder(nn.Module):
    """The decoding half, by its official keys: latent [B, code_channels, h, w] -> image [B, 3, H, W], not clamped."""

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.post_quant_conv = Conv(config.code_channels, config.code_channels)
        self.decoder = Decoder(config)

    def forward(self, latent: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(latent))
        return out


class LatentEncoder(nn.Module):
    """The encoding half: image [B, 3, H, W] in [-1, 1] -> latent [B, code_channels, h, w], before quantisation."""

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = Conv(config.code_channels, config.code_channels)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.quant_conv(self.encoder(image))
        return out


class VqTokenizer(nn.Module):
    """All weights of the tokenizer: both halves side by side, and the quantiser."""

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        encoding, decoding = LatentEncoder(config), LatentDecoder(config)
        self.encoder, self.quant_conv = encoding.encoder, encoding.quant_conv
        self.post_quant_conv, self.decoder = decoding.post_quant_conv, decoding.decoder
        self.quantize = Quantizer(config)

    def encode(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] in [-1, 1] -> latent [B, code_channels, h, w], before quantisation."""
        out: Tensor = self.quant_conv(self.encoder(image))
        return out

    def decode(self, latent: Tensor) -> Tensor:
        """Latent [B, code_channels, h, w] -> image [B, 3, H, W] clamped to [-1, 1]."""
        out: Tensor = self.decoder(self.post_quant_conv(latent))
        return out.clamp(-1, 1)


def enlarge(x: Tensor, size: Size) -> Tensor:
    """Bicubic resize of [B, C, h, w] without corner alignment (a = -0.75); the identity at equal size."""
    if (x.shape[-2], x.shape[-1]) == size:
        return x
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False)


def area_pool(x: Tensor, size: Size) -> Tensor:
    """[B, C, h, w] averaged by area down to a size: what the next scale is given to see."""
    return F.interpolate(x, size=size, mode="area")


def infer_vq_tokenizer(shapes: Mapping[str, tuple[int, ...]]) -> VqTokenizerConfig:
    """Sizes of a tokenizer from its tensors alone; read off the decoding side, so that the encoder may be missing.

    Raises:
        CheckpointError: the tensors are not those of such a tokenizer.
    """
    codes, code_channels = dims(shapes, "quantize.embedding.weight", 2, KIND)
    levels = count(shapes, r"decoder\.up\.(\d+)\.", KIND)
    blocks = count(shapes, r"decoder\.up\.0\.block\.(\d+)\.", KIND)
    channels = [dims(shapes, f"decoder.up.{i}.block.0.conv1.weight", 4, KIND)[0] for i in range(levels)]
    first = next(
        (name for name in ("encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight") if name in shapes), ""
    )
    base = dims(shapes, first, 4, KIND)[0] if first else 0
    if not base or any(c % base for c in channels):
        raise CheckpointError(
            f"not {KIND}: levels of {channels} channels over {base} base channels", expected="whole multiples"
        )
    hits = "quantize.ema_vocab_hit_SV"
    return VqTokenizerConfig(
        codes=codes,
        code_channels=code_channels,
        base_channels=base,
        channel_multipliers=tuple(c // base for c in channels),
        residual_blocks=blocks - 1,
        phis=count(shapes, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight", KIND),
        levels=dims(shapes, hits, 2, KIND)[0] if hits in shapes else VqTokenizerConfig.levels,
    )
