"""Defines the demo's latents: a per-patch autoencoder around the multi-scale binary-spherical quantiser.

Matrix products only, so it learns end to end in minutes on two cores; the official convolutional tokenizer
is then fitted to it by plain regression (train_image_tokenizer.py). Not part of what is shipped.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.scenes import held_out_scenes, render, training_scenes
from fastvar.export.image_tokenizer import bits_to_codes, enlarge

BITS, PATCH, CELLS = 16, 16, 16
GRID_SIZES = [(n, n) for n in (1, 2, 4, 6, 8, 12, 16)]
WEIGHTS = Path(__file__).parent / "training" / "patch_codec.pt"


class PatchCodec(nn.Module):
    """Images [B, 3, 256, 256] in [-1, 1] <-> latents [B, BITS, 16, 16]."""

    def __init__(self, hidden: int = 320) -> None:
        super().__init__()
        pixels = 3 * PATCH * PATCH
        self.encoder = nn.Sequential(nn.Linear(pixels + 27, hidden), nn.GELU(), nn.Linear(hidden, BITS))
        self.decoder = nn.Sequential(nn.Linear(9 * BITS, hidden), nn.GELU(), nn.Linear(hidden, pixels))

    def encode(self, images: Tensor) -> Tensor:
        """Each cell sees its own pixels and the mean colours around it."""
        pixels = F.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)  # [B, cells, pixels]
        means = F.unfold(F.pad(F.avg_pool2d(images, PATCH), (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2)
        latent: Tensor = self.encoder(torch.cat((pixels, means), dim=-1))
        return 0.5 * latent.transpose(1, 2).unflatten(2, (CELLS, CELLS))

    def decode(self, codes: Tensor) -> Tensor:
        around = F.unfold(F.pad(codes, (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2)  # [B, cells, 9 * BITS]
        pixels = self.decoder(around).transpose(1, 2).unflatten(2, (CELLS, CELLS))
        return F.pixel_shuffle(pixels, PATCH)


def quantize(latent: Tensor, flip_rate: float = 0.0, stop: Tensor | None = None) -> Tensor:
    """The quantised sum [B, BITS, h, w], with random bits flipped and each image cut after `stop` [B] scales."""
    total = torch.zeros_like(latent)
    for i, size in enumerate(GRID_SIZES):
        residual = latent - total
        positive = (F.interpolate(residual, size=size, mode="area") if size != (CELLS, CELLS) else residual) > 0
        if flip_rate:
            positive = positive ^ (torch.rand(positive.shape) < flip_rate)
        codes = enlarge(bits_to_codes(positive), (CELLS, CELLS))
        total = total + (codes if stop is None else codes * (i < stop)[:, None, None, None])
    return total


def images_of(scenes: list, rng: np.random.Generator) -> Tensor:
    pixels = np.stack([render(scene, rng=rng) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def load(file: Path = WEIGHTS) -> PatchCodec:
    codec = PatchCodec().eval().requires_grad_(False)
    codec.load_state_dict(torch.load(file))
    return codec


def psnr(image: Tensor, target: Tensor) -> float:
    return float(10 * torch.log10(4 / (image.clamp(-1, 1) - target).square().mean()))


def train(minutes: float, batch: int = 16, seed: int = 0) -> None:
    """Train for a while and save; deterministic but for when it stops."""
    torch.set_num_threads(1)  # two threads that meet at every operation crawl when anything else runs
    torch.manual_seed(seed)
    rng, scenes = np.random.default_rng(seed), training_scenes(seed)
    codec = PatchCodec()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    test = images_of(held_out_scenes(32, 1), np.random.default_rng(1))
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * max(0.02, np.cos(np.pi / 2 * progress) ** 2)
        images = images_of([next(scenes) for _ in range(batch)], rng)
        latent = codec.encode(images)
        with torch.no_grad():
            stop = torch.where(torch.rand(batch) < 0.3, torch.randint(3, 7, (batch,)), 7)
            quantised = quantize(latent, 0.01, stop)
        codes = latent + (quantised - latent).detach()
        error = codec.decode(codes) - images
        whole = (stop == 7).float()[:, None, None, None]
        commitment = ((latent - quantised).square() * whole).mean()
        loss = error.abs().mean() + error.square().mean() + 0.5 * commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 100 == 0:
            with torch.no_grad():
                latent = codec.encode(test)
                scores = [psnr(codec.decode(quantize(latent, stop=torch.full((32,), s))), test) for s in (4, 5, 6, 7)]
            print(
                f"step {step} {time.time() - start:.0f} s loss {loss:.4f} psnr after 4..7 scales",
                *np.round(scores, 2),
                flush=True,
            )
    WEIGHTS.parent.mkdir(exist_ok=True)
    torch.save(codec.state_dict(), WEIGHTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6)
    train(parser.parse_args().minutes)
