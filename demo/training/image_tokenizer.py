"""Stages 4 and 5: fit the official convolutional image tokenizer to the latent codec.

Plain regression on both sides: the decoder from quantised codes to pixels, mostly through windows around an edge;
the encoder from pixels to latents. Tensors stay in torch's usual layout: channels last, its group norms make a step 1.7
times as long. `python -m demo.training.image_tokenizer decoder|encoder` resumes where it stopped.
"""

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from demo.draw_scene import BASE_SIDE
from demo.scenes import RICH, SIZES, Scene, held_out_scenes, training_scenes
from demo.training import latent_codec
from demo.training.curve import Curve
from demo.training.latent_codec import BITS, SCHEDULES, Images, LatentCodec, draw, draw_and_encode, quantize
from demo.training.loop import (
    Steps,
    TrainingRun,
    half_precision,
    matrices_and_others,
    optimizers,
    write_atomically,
    zero_bias,
)
from demo.training.patch_codec import PATCH, psnr
from demo.training.places import CHECKPOINT, CURVES, STATES
from fastvar.export.models.infinity.tokenizer import ImageTokenizer
from fastvar.families.infinity import ImageTokenizerConfig

# 48 channels make 24 normalisation groups of two; 32 would make groups of one, which erase flat colours.
CONFIG = ImageTokenizerConfig(bits=BITS, base_channels=48, channel_multipliers=(1, 1, 1, 2, 2), residual_blocks=1)
WEIGHTS = CHECKPOINT / "image_tokenizer.pth"
SAMPLES = STATES / "image_tokenizer.png"
WINDOW = 6  # grid cells along one side of a decoded window
WHOLE_IMAGES_FROM = 0.8  # progress from which whole images are decoded: their normalisation statistics count
FLIP_RATE = 0.01
LOG_EVERY, SAVE_EVERY, EVALUATE_EVERY = 25, 50, 500  # steps


def windows(scenes: list[Scene], rng: np.random.Generator, cells: int = 16) -> list[tuple[int, int]]:
    """(row, column) of a window's first grid cell, per scene: around a shape's edge four times out of five."""
    found = []
    for scene in scenes:
        corner = rng.integers(0, cells - WINDOW + 1, 2)
        if rng.random() < 0.8:
            shape, angle = scene.shapes[rng.integers(len(scene.shapes))], rng.uniform(0, 2 * np.pi)
            x, y = np.asarray(shape.centre) + SIZES[shape.size] / BASE_SIDE * np.array((np.cos(angle), np.sin(angle)))
            near = np.array([y, x]) * cells - WINDOW / 2 + rng.integers(-2, 3, 2)
            corner = np.clip(near.round().astype(int), 0, cells - WINDOW)
        found.append((int(corner[0]), int(corner[1])))
    return found


def cut(x: Tensor, corners: list[tuple[int, int]], unit: int) -> Tensor:
    """Windows of [B, C, H, W], given in grid cells of `unit` pixels."""
    side = WINDOW * unit
    return torch.stack([x[i, :, r * unit :, c * unit :][:, :side, :side] for i, (r, c) in enumerate(corners)])


def pixel_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """Absolute, squared and edge error, and that of the colours of 8x8 blocks."""
    error = decoded.float() - target
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    colors = F.avg_pool2d(error, 8).square().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + 4 * colors


def decoder_losses(model: ImageTokenizer, codec: LatentCodec, step: int, progress: float) -> dict[str, Tensor]:
    """What the decoder makes of the quantised codes, at both sizes."""
    whole = progress >= WHOLE_IMAGES_FROM
    scenes = list(islice(training_scenes((6, step), RICH), 1 if whole else 4))
    images, losses = draw(scenes, (6, step)), {}
    with torch.no_grad():
        latents = codec.encode(images)
    for side, latent, target in zip(SCHEDULES, latents, images, strict=True):
        if whole and side != tuple(SCHEDULES)[step % len(SCHEDULES)]:
            continue  # one size a step: memory
        codes = quantize(latent, SCHEDULES[side], FLIP_RATE)
        if not whole:
            corners = windows(scenes, np.random.default_rng((7, step)), latent.shape[-1])
            codes, target = cut(codes, corners, 1), cut(target, corners, PATCH)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = model.decoder(codes)
        losses[str(side)] = pixel_loss(decoded, target)
    return losses


def encoder_losses(model: ImageTokenizer, codec: LatentCodec, step: int, _: float) -> dict[str, Tensor]:
    """Squared error of the latents of one size, in units of one code step."""
    scenes = list(islice(training_scenes((6, step), RICH), 3 if step % 2 else 1))
    side = tuple(SCHEDULES)[0 if step % 2 else 1]
    with torch.no_grad():
        image, target = draw_and_encode(codec, scenes, (6, step), side)
    with torch.autocast("cpu", torch.bfloat16):
        latent = model.encoder(image)
    return {str(side): (latent.float() - target).square().mean() * CONFIG.bits}


def initialize(model: nn.Module) -> None:
    """Unit gain through every convolution and small residual branches; torch's default shrinks the stream."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=fan_in**-0.5 * (0.2 if "conv2" in name else 1.0))
            zero_bias(module)


STEPS = {"decoder": 8000, "encoder": 3000}
LOSSES = {"decoder": decoder_losses, "encoder": encoder_losses}


def train(part: str, steps: int) -> None:
    """Train one half; the other half of the saved tokenizer stays as it is."""
    torch.set_num_threads(1)  # two threads that meet at every operation crawl when anything else runs
    torch.manual_seed(0)
    model, codec = ImageTokenizer(CONFIG), latent_codec.load()
    half: nn.Module = getattr(model, part)
    initialize(half)
    run = TrainingRun(
        half, optimizers(*matrices_and_others(half), 2e-3, 0.0), STATES / f"{part}.pt", Steps(steps), 0.995
    )
    curve = Curve(CURVES / f"{part}.csv", ("256", "512", *MEASURED), run.step)
    test = draw(held_out_scenes(8, 1, RICH), (1,))
    while run.progress < 1:
        losses = LOSSES[part](model, codec, run.step, run.progress)
        torch.stack(list(losses.values())).sum().backward()
        run.update()
        curve.add({side: loss.item() for side, loss in losses.items()})
        if run.step % EVALUATE_EVERY == 0:
            export(part, run.averaged)
            curve.add(evaluate(codec, test))
        if run.step % LOG_EVERY == 0:
            print(f"{part} {curve.write(run.step, run.used_s)}", flush=True)
        if run.step % SAVE_EVERY == 0:
            run.save()
    run.save()
    export(part, run.averaged)
    print(evaluate(codec, test), flush=True)


def export(part: str, weights: dict[str, Tensor]) -> None:
    """Put one half into the official file, rounded to fp16."""
    state = {k: v.half() for k, v in ImageTokenizer(CONFIG).state_dict().items()}
    if WEIGHTS.exists():
        state |= torch.load(WEIGHTS)["vae"]
    state |= {f"{part}.{k}": v for k, v in half_precision(weights).items()}
    write_atomically({"vae": state}, WEIGHTS)


def load(file: Path = WEIGHTS) -> ImageTokenizer:
    """The trained image tokenizer in fp32, without gradients."""
    model = ImageTokenizer(CONFIG).eval().requires_grad_(False)
    model.load_state_dict(torch.load(file)["vae"])
    return model


MEASURED = ("decoder_psnr_256", "decoder_psnr_512", "round_trip_256", "round_trip_512")


@torch.no_grad()
def evaluate(codec: LatentCodec, images: Images) -> dict[str, float]:
    """Mean PSNR in dB of the official decoder on the codec's latents and on the official encoder's; a sheet of samples:
    truth, codec, decoder, round trip."""
    model, result, rows = load(), {}, []
    for side, latent, target in zip(SCHEDULES, codec.encode(images), images, strict=True):
        codes = {"decoder_psnr": latent, "round_trip": model.encoder(target)}
        decoded = {
            name: torch.cat([model.decode(quantize(one, SCHEDULES[side])) for one in own.split(1)])
            for name, own in codes.items()
        }
        for name, own in decoded.items():
            result[f"{name}_{side}"] = float(np.mean([psnr(*pair) for pair in zip(own, target, strict=True)]))
        rows += [target, codec.decode(quantize(latent, SCHEDULES[side])), *decoded.values()]
    rows = [F.interpolate(row[:6], size=min(SCHEDULES), mode="area").clamp(-1, 1) for row in rows]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Image.fromarray(((sheet.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).save(SAMPLES)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=LOSSES)
    parser.add_argument("--steps", type=int, help=f"by default {STEPS}")
    arguments = parser.parse_args()
    train(arguments.part, arguments.steps or STEPS[arguments.part])
