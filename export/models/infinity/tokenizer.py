"""Infinity's image tokenizer in torch: the convolutional encoder and decoder around multi-scale binary-spherical codes.

Module names follow the official checkpoint keys (upstream: infinity/models/bsq_vae).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....errors import CheckpointError
from ....families.infinity import ImageTokenizerConfig
from ..common import tokenizer_blocks
from ..common.tensor_shapes import count, dims
from ..common.tokenizer_blocks import enlarge


class Encoder(tokenizer_blocks.Encoder):
    """The encoder under the keys of Infinity's program, without attention."""

    layers = tokenizer_blocks.WRAPPED


class Decoder(tokenizer_blocks.Decoder):
    """The decoder under the keys of Infinity's program, without attention; it reads summed codes."""

    layers = tokenizer_blocks.WRAPPED


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
