"""The image tokenizer of VAR and HART in torch: the convolutional encoder and decoder around a multi-scale codebook.

Module names follow the official checkpoint keys (upstream: VAR, models/vqvae.py, models/basic_vae.py and
models/quant.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.schedule import Size
from ....errors import CheckpointError
from ....families.codebook import VqTokenizerConfig, phi_index
from ..common import tokenizer_blocks
from ..common.tensor_shapes import count, dims
from ..common.tokenizer_blocks import Conv, Decoder, Encoder

KIND = "a VQ image tokenizer"


class Phi(Conv):
    """(1 - ratio) x + ratio conv(x): smooths what enlarging has made of a scale's codes."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels)
        self.ratio = ratio

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - self.ratio) + super().forward(x) * self.ratio


class Quantizer(nn.Module):
    """The codebook, and how the codes of all scales add up to a latent: coarse to fine, each by its phi.

    A token map is int64 [B, h, w], its codes [B, code_channels, h, w].
    """

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.codes, config.code_channels)
        phis = (Phi(config.code_channels, config.phi_ratio) for _ in range(config.phis))
        self.quant_resi = nn.ModuleDict({"qresi_ls": nn.ModuleList(phis)})
        self.register_buffer(
            "ema_vocab_hit_SV", torch.zeros(config.max_scales, config.codes)
        )  # of use in training alone

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
        phis = cast(nn.ModuleList, self.quant_resi["qresi_ls"])
        out: Tensor = phis[phi_index(scale, scales)](enlarge(codes, final))
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


class LatentEncoder(nn.Module):
    """The encoding half, by its official keys: image [B, 3, H, W] in [-1, 1] -> latent [B, code_channels, h, w], before
    quantisation.
    """

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.quant_conv = Conv(config.code_channels, config.code_channels)

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.quant_conv(self.encoder(image))
        return out


class LatentDecoder(nn.Module):
    """The decoding half, by its official keys: latent [B, code_channels, h, w] -> image [B, 3, H, W], not clamped."""

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.post_quant_conv = Conv(config.code_channels, config.code_channels)
        self.decoder = Decoder(config)

    def forward(self, latent: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.post_quant_conv(latent))
        return out


class VqTokenizer(nn.Module):
    """All weights of the tokenizer: both halves side by side, and the quantiser."""

    def __init__(self, config: VqTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv, self.post_quant_conv = (Conv(config.code_channels, config.code_channels) for _ in range(2))
        self.decoder = Decoder(config)
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
    return tokenizer_blocks.enlarge(x, size, "bicubic")


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
        max_scales=dims(shapes, hits, 2, KIND)[0] if hits in shapes else VqTokenizerConfig.max_scales,
    )
