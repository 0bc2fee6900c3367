"""Stage 2: defines the demo's latents, for images of both sizes, around the multi-scale binary-spherical quantiser.

The latents of a 512x512 image are those of its 256x256 form, each in 2x2 cells, and details whose mean over these cells
is zero. So the scales that both sizes share mean the same in both, and one transformer serves them without being told
the size. `python -m demo.training.latent_codec` resumes where it stopped.
"""

import argparse
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from demo.scenes import RICH, Scene, held_out_scenes, training_scenes
from demo.training.curve import Curve
from demo.training.loop import Steps, TrainingRun, matrices_and_others, optimizers, write_atomically
from demo.training.patch_codec import PATCH, PatchDecoder, PatchEncoder, images_of, psnr
from demo.training.places import CURVES, STATES
from fastvar.core.schedule import ScaleSchedule
from fastvar.export.models.common.tokenizer_blocks import enlarge
from fastvar.export.models.infinity.tokenizer import bits_to_codes
from fastvar.families.infinity_presets import schedule_for

BITS, HIDDEN = 48, 512
SCHEDULES = {side: schedule_for((side, side)) for side in (256, 512)}
WEIGHTS = STATES / "latent_codec.pt"
STATE = STATES / "latent_codec_state.pt"
SAMPLES = STATES / "latent_codec.png"
WINDOW = 14  # cells along one side of what is decoded of a 512x512 image
SMALL_SCALES = 3  # images may be cut after as many: the coarse scales shall carry the layout
CUT_RATE, FLIP_RATE = 0.1, 0.003
LARGE_EVERY = 4  # steps: large images, whose cells show a quarter as much, are easier and cost four times as much
SAVE_EVERY = 100  # steps
LR = 3e-3


class Images(NamedTuple):
    """The same scenes at both sizes, [B, 3, side, side] in [-1, 1]."""

    small: Tensor
    large: Tensor


def draw(scenes: list[Scene], seed: tuple[int, ...]) -> Images:
    """Both sizes with the same jitter, of a stream of its own: scenes come from that of the seed itself."""
    return Images(*(images_of(scenes, np.random.default_rng((*seed, 1)), side) for side in SCHEDULES))


class LatentCodec(nn.Module):
    """Images of 256x256 and of 512x512 <-> latents [B, BITS, 16, 16] and [B, BITS, 32, 32]."""

    def __init__(self, bits: int = BITS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.base, self.detail = PatchEncoder(bits, hidden, hidden, hidden), PatchEncoder(bits, hidden, hidden)
        self.decoder = PatchDecoder(bits, hidden, 2 * hidden, 2 * hidden)

    def encode(self, images: Images) -> tuple[Tensor, Tensor]:
        """The latents of both sizes; the mean of each 2x2 cells of the second is a cell of the first."""
        base, detail = self.base(images.small), self.detail(images.large)
        means = F.interpolate(base - F.avg_pool2d(detail, 2), scale_factor=2, mode="nearest")
        return base, detail + means

    def decode(self, codes: Tensor) -> Tensor:
        """Codes of either size, or of a window -> images in [-1, 1], not clamped."""
        images: Tensor = self.decoder(codes)
        return images


def draw_and_encode(codec: LatentCodec, scenes: list[Scene], seed: tuple[int, ...], side: int) -> tuple[Tensor, Tensor]:
    """The images of one size that `draw` makes, and their latents; small ones cost nothing of the large."""
    if side == min(SCHEDULES):
        small = images_of(scenes, np.random.default_rng((*seed, 1)))
        return small, codec.base(small)
    images = draw(scenes, seed)
    return images.large, codec.encode(images)[1]


def quantize(latent: Tensor, schedule: ScaleSchedule, flip_rate: float = 0.0, stop: Tensor | None = None) -> Tensor:
    """The quantised sum [B, bits, h, w], with random bits flipped and each image cut after `stop` [B] scales."""
    total = torch.zeros_like(latent)
    for i, size in enumerate(schedule.sizes):
        residual = latent - total
        positive = (residual if size == schedule.final else F.interpolate(residual, size=size, mode="area")) > 0
        if flip_rate:
            positive = positive ^ (torch.rand(positive.shape) < flip_rate)
        codes = enlarge(bits_to_codes(positive), schedule.final)
        total = total + (codes if stop is None else codes * (i < stop)[:, None, None, None])
    return total


def load(file: Path = WEIGHTS) -> LatentCodec:
    """The trained codec, without gradients."""
    codec = LatentCodec().eval().requires_grad_(False)
    codec.load_state_dict(torch.load(file))
    return codec


def codec_losses(codec: LatentCodec, images: Images) -> dict[str, Tensor]:
    """Losses of both sizes, see `codec_loss`."""
    latents = codec.encode(images)
    return {
        str(side): codec_loss(codec, latent, target, side)
        for side, latent, target in zip(SCHEDULES, latents, images, strict=True)
    }


def codec_loss(codec: LatentCodec, latent: Tensor, target: Tensor, side: int) -> Tensor:
    """Pixel error through the quantiser, straight-through, with the draw of latents to what they are quantised to; some
    images are cut after a few scales, and of large ones a window is decoded."""
    latent, schedule = latent.float(), SCHEDULES[side]
    scales = len(schedule)
    with torch.no_grad():
        cut = torch.rand(len(latent)) < CUT_RATE
        stop = torch.where(cut, torch.randint(SMALL_SCALES, scales, cut.shape), scales)
        quantised = quantize(latent.detach(), schedule, FLIP_RATE, stop)
    codes = latent + (quantised - latent).detach()
    if side == max(SCHEDULES):
        row, column = torch.randint(schedule.final[0] - WINDOW + 1, (2,)).tolist()
        codes = codes[..., row : row + WINDOW, column : column + WINDOW]
        target = target[..., row * PATCH :, column * PATCH :][..., : WINDOW * PATCH, : WINDOW * PATCH]
    error = codec.decode(codes).float() - target
    whole = (stop == scales).float()[:, None, None, None]
    commitment = ((latent - quantised).square() * whole).mean()
    return error.abs().mean() + error.square().mean() + 0.5 * commitment


def step_losses(codec: LatentCodec, step: int, batch: int) -> dict[str, Tensor]:
    """Of fresh scenes, the same ones for a step whenever it is taken; of large images at one step in `LARGE_EVERY`."""
    seed = (2, step)
    scenes = list(islice(training_scenes(seed, RICH), batch))
    with torch.autocast("cpu", torch.bfloat16):
        if step % LARGE_EVERY == 0:
            return codec_losses(codec, draw(scenes, seed))
        side = min(SCHEDULES)
        image, latent = draw_and_encode(codec, scenes, seed, side)
        return {str(side): codec_loss(codec, latent, image, side)}


@torch.no_grad()
def evaluate(codec: LatentCodec, images: Images) -> dict[str, float]:
    """PSNR of held-out scenes in dB, of both sizes, whole and after the scales that the sizes share."""
    small, large = codec.encode(images)
    shared = torch.full((len(small),), len(SCHEDULES[256]))
    return {
        "psnr_256": psnr(codec.decode(quantize(small, SCHEDULES[256])), images.small),
        "psnr_512": psnr(codec.decode(quantize(large, SCHEDULES[512])), images.large),
        "psnr_512_shared": psnr(codec.decode(quantize(large, SCHEDULES[512], stop=shared)), images.large),
    }


@torch.no_grad()
def write_samples(codec: LatentCodec, images: Images, count: int = 6) -> None:
    """A sheet of truth over what the codec makes of it, at 256x256."""
    chosen = Images(images.small[:count], images.large[:count])
    small, large = codec.encode(chosen)
    decoded = codec.decode(quantize(small, SCHEDULES[256])), codec.decode(quantize(large, SCHEDULES[512]))
    rows = [chosen.small, decoded[0], F.avg_pool2d(decoded[1], 2)]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1).clamp(-1, 1)
    Image.fromarray(((sheet.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).save(SAMPLES)


def train(steps: int, batch: int = 16) -> None:
    """Train, resuming from the last checkpoint, and save."""
    torch.set_num_threads(1)  # two threads that meet at every operation crawl when anything else runs
    torch.manual_seed(0)
    codec = LatentCodec()
    run = TrainingRun(codec, optimizers(*matrices_and_others(codec), LR, 0.0), STATE, Steps(steps), average=0.0)
    curve = Curve(CURVES / "latent_codec.csv", ("256", "512", "psnr_256", "psnr_512", "psnr_512_shared"), run.step)
    test = draw(held_out_scenes(16, 1, RICH), (1,))
    while run.progress < 1:
        losses = step_losses(codec, run.step, batch)
        torch.stack(list(losses.values())).sum().backward()
        run.update()
        curve.add({side: loss.item() for side, loss in losses.items()})
        if run.step % SAVE_EVERY == 0:
            curve.add(evaluate(codec, test))
            print(curve.write(run.step, run.used_s), flush=True)
            write_samples(codec, test)
            run.save()
    run.save()
    write_atomically(codec.state_dict(), WEIGHTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7000)
    train(parser.parse_args().steps)
