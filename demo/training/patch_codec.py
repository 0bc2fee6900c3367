"""An autoencoder of patches by matrix products alone: it learns in minutes on one core what a cell's code may be.

The official convolutional tokenizers are fitted to such codecs by plain regression. Not part of what is shipped.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.draw_scene import BASE_SIDE, render
from demo.scenes import Scene

BITS, PATCH = 16, 16


class Residual(nn.Sequential):
    """Another hidden layer beside the stream, [..., width]; does nothing before it is trained."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        for parameter in self[3].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PatchEncoder(nn.Sequential):
    """Images [B, 3, H, W] in [-1, 1] -> latents [B, channels, H / 16, W / 16]. more: widths of further layers."""

    def __init__(self, channels: int, hidden: int, *more: int) -> None:
        residuals = [Residual(hidden, width) for width in more]
        super().__init__(nn.Linear(3 * PATCH**2 + 27, hidden), nn.GELU(), *residuals, nn.Linear(hidden, channels))

    def forward(self, images: Tensor) -> Tensor:
        """Each cell sees its own pixels and the mean colours around it."""
        pixels = F.pixel_unshuffle(images, PATCH)  # [B, 3 * 256, h, w]
        means = F.unfold(F.pad(F.avg_pool2d(images, PATCH), (1, 1, 1, 1), mode="replicate"), 3)  # [B, 27, h * w]
        latent: Tensor = super().forward(torch.cat((pixels.flatten(2), means), dim=1).transpose(1, 2))
        return 0.5 * latent.transpose(1, 2).unflatten(2, pixels.shape[2:])


class PatchDecoder(nn.Sequential):
    """Codes [B, channels, h, w] -> images [B, 3, 16h, 16w]; each cell sees the codes around it."""

    def __init__(self, channels: int, hidden: int, *more: int) -> None:
        residuals = [Residual(hidden, width) for width in more]
        super().__init__(nn.Linear(9 * channels, hidden), nn.GELU(), *residuals, nn.Linear(hidden, 3 * PATCH**2))

    def forward(self, codes: Tensor) -> Tensor:
        around = F.unfold(F.pad(codes, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2)  # [B, h * w, 9 * channels]
        pixels: Tensor = super().forward(around)
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, codes.shape[2:]), PATCH)


class PatchCodec(nn.Module):
    """Images [B, 3, H, W] <-> latents [B, BITS, H / 16, W / 16]."""

    def __init__(self, hidden: int = 320) -> None:
        super().__init__()
        self.encoder, self.decoder = PatchEncoder(BITS, hidden), PatchDecoder(BITS, hidden)

    def encode(self, images: Tensor) -> Tensor:
        latent: Tensor = self.encoder(images)
        return latent

    def decode(self, codes: Tensor) -> Tensor:
        images: Tensor = self.decoder(codes)
        return images


def images_of(scenes: list[Scene], rng: np.random.Generator, size: int = BASE_SIDE) -> Tensor:
    """Drawn with jitter: [B, 3, size, size] in [-1, 1]."""
    pixels = np.stack([render(scene, size, rng) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(image: Tensor, target: Tensor) -> float:
    return float(10 * torch.log10(4 / (image.clamp(-1, 1) - target).square().mean()))
