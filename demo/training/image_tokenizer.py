"""Stage 2: fits the official convolutional image tokenizer to the patch codec's latents.

Plain regression on both sides: the decoder from quantised codes to pixels, mostly through windows around a shape;
the encoder from pixels to latents. `python -m demo.training.image_tokenizer decoder|encoder` resumes where it stopped.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from demo.scenes import Scene, held_out_scenes, training_scenes
from demo.training.loop import TrainingRun, Workers, half_precision, optimizers, write_atomically, zero_bias
from demo.training.patch_codec import CELLS, PATCH, PatchCodec, images_of, load, psnr, quantize
from fastvar.export.models.infinity.tokenizer import ImageTokenizer
from fastvar.families.infinity import ImageTokenizerConfig

# 48 channels make 24 normalisation groups of two; 32 would make groups of one, which erase flat colours.
CONFIG = ImageTokenizerConfig(bits=16, base_channels=48, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=0)
ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "checkpoint" / "image_tokenizer.pth"
SAMPLES = ROOT / "out" / "training" / "image_tokenizer.png"
WINDOW = 6  # grid cells along one side of a decoded window
WHOLE_IMAGES_FROM = 0.8  # progress from which whole images are decoded: their normalisation statistics count
FLIP_RATE = 0.01
SAVE_EVERY_S = 60


def windows(scenes: list[Scene], rng: np.random.Generator) -> list[tuple[int, int]]:
    """(row, column) of a window's first grid cell, per scene: around a shape four times out of five."""
    found = []
    for scene in scenes:
        corner = rng.integers(0, CELLS - WINDOW + 1, 2)
        if rng.random() < 0.8:
            x, y = scene.shapes[rng.integers(len(scene.shapes))].centre
            near = np.array([y, x]) * CELLS - WINDOW / 2 + rng.integers(-3, 4, 2)
            corner = np.clip(near.round().astype(int), 0, CELLS - WINDOW)
        found.append((int(corner[0]), int(corner[1])))
    return found


def cut(x: Tensor, corners: list[tuple[int, int]], unit: int) -> Tensor:
    """Windows of [B, C, H, W], given in grid cells of `unit` pixels."""
    side = WINDOW * unit
    return torch.stack([x[i, :, r * unit :, c * unit :][:, :side, :side] for i, (r, c) in enumerate(corners)])


def decoder_loss(
    model: ImageTokenizer, codec: PatchCodec, scenes: list[Scene], rng: np.random.Generator, progress: float
) -> Tensor:
    """Absolute, squared and edge error of what the decoder makes of the quantised codes."""
    target = images_of(scenes, rng)
    codes = quantize(codec.encode(target), FLIP_RATE)
    if progress < WHOLE_IMAGES_FROM:
        corners = windows(scenes, rng)
        codes, target = cut(codes, corners, 1), cut(target, corners, PATCH)
    error = model.decoder(codes) - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    colors = F.avg_pool2d(error, 8).square().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + 4 * colors


def encoder_loss(
    model: ImageTokenizer, codec: PatchCodec, scenes: list[Scene], rng: np.random.Generator, _: float
) -> Tensor:
    """Squared error of the latents, in units of one code step."""
    images = images_of(scenes, rng)
    return (model.encoder(images) - codec.encode(images)).square().mean() * CONFIG.bits


def initialize(model: nn.Module) -> None:
    """Unit gain through every convolution and small residual branches; torch's default shrinks the stream."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5 * (0.2 if "conv2" in name else 1.0))
            zero_bias(module)


LOSSES = {"decoder": (decoder_loss, 4), "encoder": (encoder_loss, 2)}


def train(part: str, minutes: float, workers: int) -> None:
    """Train one half; the other half of the saved tokenizer stays as it is."""
    torch.manual_seed(0)
    model, codec = ImageTokenizer(CONFIG), load()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub leaves this one out
    half: nn.Module = getattr(model, part)
    initialize(half)
    loss, batch = LOSSES[part]
    matrices = [p for p in half.parameters() if p.dim() > 1]
    others = [p for p in half.parameters() if p.dim() <= 1]
    run = TrainingRun(
        half,
        optimizers(matrices, others, 2e-3, 0.0),
        ROOT / "out" / "training" / f"tokenizer_{part}.pt",
        minutes,
        0.995,
    )
    team = Workers(half, workers)
    streams = [batches(batch, seed=1000 * run.step + i) for i in range(workers)]
    saved = time.monotonic()
    while run.progress < 1:
        value = team.backward(lambda i: loss(model, codec, *next(streams[i]), run.progress))
        run.update()
        if run.step % 25 == 0:
            print(f"{part} step {run.step} {run.used_s:.0f} s loss {value.mean().item():.4f}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY_S:
            run.save()
            export(part, run.averaged)
            saved = time.monotonic()
    run.save()
    export(part, run.averaged)


def batches(size: int, seed: int) -> Iterator[tuple[list[Scene], np.random.Generator]]:
    scenes, rng = training_scenes(seed), np.random.default_rng(seed)
    while True:
        yield [next(scenes) for _ in range(size)], rng


def export(part: str, weights: dict[str, Tensor]) -> None:
    """Put one half into the official file, rounded to fp16, and say how good it is on held-out scenes."""
    state = {k: v.half() for k, v in ImageTokenizer(CONFIG).state_dict().items()}
    if WEIGHTS.exists():
        state |= torch.load(WEIGHTS)["vae"]
    state |= {f"{part}.{k}": v for k, v in half_precision(weights).items()}
    write_atomically({"vae": state}, WEIGHTS)
    print(evaluate(), flush=True)


@torch.no_grad()
def evaluate(count: int = 8) -> str:
    """PSNR of decoded codec latents, bits on which the encoder differs from the codec, and a sheet of samples."""
    model = ImageTokenizer(CONFIG).eval()
    model.load_state_dict({k: v.float() for k, v in torch.load(WEIGHTS)["vae"].items()})
    images, codec = images_of(held_out_scenes(count, 1), np.random.default_rng(1)), load()
    latent = codec.encode(images)
    decoded = model.decode(quantize(latent))
    distance = F.mse_loss(model.encoder(images), latent).sqrt()
    rows = [images, codec.decode(quantize(latent)).clamp(-1, 1), decoded]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray(((sheet.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).save(SAMPLES)
    return f"held-out: decoder {psnr(decoded, images):.2f} dB, encoder off by {distance:.4f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=LOSSES)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    train(arguments.part, arguments.minutes, arguments.workers)
