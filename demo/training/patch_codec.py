"""Defines the demo's latents: a per-patch autoencoder around the multi-scale binary-spherical quantiser.

Matrix products only, so it learns end to end in minutes on two cores; the official convolutional tokenizer
is then fitted to it by plain regression (image_tokenizer.py). Not part of what is shipped.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.scenes import Scene, held_out_scenes, render, training_scenes
from demo.training.loop import TrainingRun, write_atomically
from fastvar.export.models.common.tokenizer_blocks import enlarge
from fastvar.export.models.infinity.tokenizer import bits_to_codes

BITS, PATCH, CELLS = 16, 16, 16
GRID_SIZES = [(n, n) for n in (1, 2, 4, 6, 8, 12, 16)]
WEIGHTS = Path(__file__).parents[1] / "out" / "training" / "patch_codec.pt"
STATE = WEIGHTS.with_name("patch_codec_state.pt")


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


def images_of(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    pixels = np.stack([render(scene, rng=rng) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def load(file: Path = WEIGHTS) -> PatchCodec:
    codec = PatchCodec().eval().requires_grad_(False)
    codec.load_state_dict(torch.load(file))
    return codec


def psnr(image: Tensor, target: Tensor) -> float:
    return float(10 * torch.log10(4 / (image.clamp(-1, 1) - target).square().mean()))


def codec_loss(codec: PatchCodec, images: Tensor) -> Tensor:
    """Pixel error through the quantiser, straight-through; some images are cut after a few scales, so that the
    coarse ones carry the layout, and latents are drawn to what they are quantised to."""
    latent = codec.encode(images)
    with torch.no_grad():
        stop = torch.where(torch.rand(len(images)) < 0.3, torch.randint(3, 7, (len(images),)), 7)
        quantised = quantize(latent, 0.01, stop)
    error = codec.decode(latent + (quantised - latent).detach()) - images
    whole = (stop == 7).float()[:, None, None, None]
    commitment = ((latent - quantised).square() * whole).mean()
    return error.abs().mean() + error.square().mean() + 0.5 * commitment


@torch.no_grad()
def evaluate(codec: PatchCodec, images: Tensor) -> str:
    latent = codec.encode(images)
    stops = (torch.full((len(images),), s) for s in (4, 5, 6, 7))
    scores = [f"{psnr(codec.decode(quantize(latent, stop=stop)), images):.2f}" for stop in stops]
    return f"held-out after 4 to 7 scales: {' '.join(scores)} dB"


def train(minutes: float, batch: int = 16, seed: int = 0) -> None:
    """Train for a while, resuming from the last checkpoint, and save."""
    torch.set_num_threads(1)  # two threads that meet at every operation crawl when anything else runs
    torch.manual_seed(seed)
    codec = PatchCodec()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    optimizer.param_groups[0]["peak_lr"] = 3e-3
    run = TrainingRun(codec, [optimizer], STATE, minutes, average=0.0)
    rng, scenes = np.random.default_rng(seed + run.step), training_scenes(seed + run.step)
    test = images_of(held_out_scenes(32, 1), np.random.default_rng(1))
    while run.progress < 1:
        loss = codec_loss(codec, images_of([next(scenes) for _ in range(batch)], rng))
        loss.backward()
        run.update()
        if run.step % 100 == 0:
            print(f"step {run.step} {run.used_s:.0f} s loss {loss.item():.4f} {evaluate(codec, test)}", flush=True)
            run.save()
    run.save()
    write_atomically(codec.state_dict(), WEIGHTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6)
    train(parser.parse_args().minutes)
