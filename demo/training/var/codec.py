"""Defines the latents and the codebook of the demo's class-conditional model: classes, codec, residual quantisation.

The patch codec (patch_codec.py) learns them end to end around the official quantiser; the official convolutional
tokenizer is then fitted to it by plain regression (stages.py).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.read_scene import SeenShape, read_scene
from demo.scenes import CELLS, COLORS, SIMPLE, Scene, Shape
from demo.training.loop import Minutes, TrainingRun, write_atomically, zero_bias
from demo.training.patch_codec import BITS, PatchCodec, images_of, psnr
from fastvar.export.models.codebook.tokenizer import Phi, Quantizer, area_pool
from fastvar.families.codebook import VqTokenizerConfig
from fastvar.families.var import SCALES_256

# 64 channels make normalisation groups of two; 32 would make groups of one, which erase flat colours.
TOKENIZER = VqTokenizerConfig(
    codes=512, code_channels=BITS, base_channels=64, channel_multipliers=(1, 1, 1, 1, 1), residual_blocks=0
)
GRID_SIZES = [(side, side) for side in SCALES_256]
CLASSES = [f"{color} {kind}" for color in COLORS for kind in SIMPLE.kinds]
ROOT = Path(__file__).parents[2]
STATES = ROOT / "out" / "training" / "var"
WEIGHTS = STATES / "codec.pt"
LEARNING_RATE = 3e-3
SPREAD = 0.5  # root mean square of the latents
REVIVE_EVERY = 25  # steps
REVIVE_UNTIL = 0.8  # progress: codes settle behind it


def class_scene(label: int, rng: np.random.Generator) -> Scene:
    """One large plain shape of the class, anywhere, on any background."""
    cell, background = (tuple(options)[rng.integers(len(options))] for options in (CELLS, SIMPLE.backgrounds))
    color, kind = CLASSES[label].split()
    return Scene(background, (Shape(kind, color, "large", "plain", cell),), "alone")


def only_shape(image: np.ndarray) -> SeenShape | None:
    """The shape in uint8 [256, 256, 3]; None unless it shows one alone."""
    shapes = read_scene(image).shapes
    return shapes[0] if len(shapes) == 1 else None


def read_class(image: np.ndarray) -> int | None:
    """The class that uint8 [256, 256, 3] shows; None unless it shows one shape alone."""
    shape = only_shape(image)
    return None if shape is None else CLASSES.index(f"{shape.color} {shape.kind}")


def draw_classes(count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Scene]]:
    """Random classes [count], and a scene of each."""
    labels = rng.integers(len(CLASSES), size=count)
    return labels, [class_scene(int(label), rng) for label in labels]


class VqCodec(nn.Module):
    """Patch codec and official quantiser; the last one keeps its official keys."""

    def __init__(self, config: VqTokenizerConfig = TOKENIZER) -> None:
        super().__init__()
        self.codec, self.quantizer = PatchCodec(), Quantizer(config)

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, 256, 256] in [-1, 1] -> [B, code_channels, 16, 16], every cell of the same length.

        Free to grow, latents run away from their codes: the pixel error alone would have them ever larger.
        """
        return SPREAD * BITS**0.5 * F.normalize(self.codec.encode(images), dim=1)

    @torch.no_grad()
    def token_maps(self, latent: Tensor) -> list[Tensor]:
        """Per scale int64 [B, h, w]."""
        return self.quantizer.quantize(latent, GRID_SIZES)[0]

    def sums(self, token_maps: Sequence[Tensor]) -> Tensor:
        """The latent after every scale [scales, B, code_channels, 16, 16]."""
        codes = [self.quantizer.lookup(token_map) for token_map in token_maps]
        return torch.stack(list(self.quantizer.sums(codes, GRID_SIZES[-1])))


def codec_loss(model: VqCodec, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, the sums, and the token maps of a batch.

    Pixel error through the quantiser, straight-through; some images are cut after a few scales, so that the coarse
    ones carry the layout. Codes are drawn to latents after every scale, and latents to codes (VAR's two terms).
    """
    latent = model.encode(images)
    maps = model.token_maps(latent)
    sums = model.sums(maps)
    scales, batch = len(sums), len(images)
    stop = torch.where(torch.rand(batch) < 0.3, torch.randint(4, scales, (batch,)), scales) - 1
    quantised = sums[stop, torch.arange(batch)].detach()
    error = model.codec.decode(latent + (quantised - latent).detach()) - images
    codebook = (sums - latent.detach()).square().mean() + (sums[-1] - latent.detach()).square().mean()
    commitment = (latent - sums[-1].detach()).square().mean()
    return error.abs().mean() + error.square().mean() + codebook + 0.5 * commitment, sums.detach(), maps


@torch.no_grad()
def revive(model: VqCodec, latent: Tensor, sums: Tensor, hits: Tensor) -> int:
    """Put codes that nothing used where residuals of random scales lie; returns how many."""
    before = torch.cat((torch.zeros_like(sums[:1]), sums[:-1]))
    cells = [
        area_pool(latent - seen, size).permute(0, 2, 3, 1).flatten(0, 2)
        for seen, size in zip(before, GRID_SIZES, strict=True)
    ]
    dead = (hits == 0).nonzero().flatten()
    for code in dead.tolist():
        own = cells[int(torch.randint(len(cells), ()))]
        model.quantizer.embedding.weight[code] = own[int(torch.randint(len(own), ()))]
    return len(dead)


def initialize(model: VqCodec) -> None:
    """Phi convolutions begin as the identity, codes small; `revive` places them by what a first batch needs."""
    nn.init.normal_(model.quantizer.embedding.weight, std=0.02)
    for phi in model.quantizer.modules():
        if isinstance(phi, Phi):
            nn.init.dirac_(phi.weight)
            zero_bias(phi)


def load() -> VqCodec:
    model = VqCodec().eval().requires_grad_(False)
    model.load_state_dict(torch.load(WEIGHTS))
    return model


@torch.no_grad()
def evaluate(model: VqCodec, images: Tensor, labels: np.ndarray) -> str:
    """PSNR after some scales, and how many classes are read back after the last."""
    sums = model.sums(model.token_maps(model.encode(images)))
    scores = [f"{psnr(model.codec.decode(sums[i]), images):.2f}" for i in (3, 5, 7, 8, 9)]
    pixels = to_pixels(model.codec.decode(sums[-1]))
    read = np.mean([read_class(image) == label for image, label in zip(pixels, labels, strict=True)])
    return f"after scales 3 5 7 8 9: {' '.join(scores)} dB, classes read back {read:.3f}"


def to_pixels(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] around [-1, 1] -> uint8 [B, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def train(minutes: float, batch: int = 16, seed: int = 0, states: Path = STATES) -> None:
    """Train for a while, resuming from the last checkpoint, and save."""
    torch.set_num_threads(1)  # two threads that meet at every operation crawl when anything else runs
    torch.manual_seed(seed)
    model = VqCodec()
    initialize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    optimizer.param_groups[0]["peak_lr"] = LEARNING_RATE
    run = TrainingRun(model, [optimizer], states / "codec_state.pt", Minutes(minutes), average=0.0)
    rng, hits = np.random.default_rng(seed + run.step), torch.zeros(TOKENIZER.codes)
    labels, scenes = draw_classes(64, np.random.default_rng(1))
    test, revived = images_of(scenes, np.random.default_rng(1)), 0
    while run.progress < 1:
        images = images_of(draw_classes(batch, rng)[1], rng)
        loss, sums, maps = codec_loss(model, images)
        loss.backward()
        run.update()
        hits += torch.bincount(torch.cat([m.flatten() for m in maps]), minlength=TOKENIZER.codes)
        if run.step % REVIVE_EVERY == 1 and run.progress < REVIVE_UNTIL:
            revived = revive(model, model.encode(images).detach(), sums, hits)
            hits.zero_()
        if run.step % 100 == 0:
            told = f"loss {loss.item():.4f}, {revived} codes revived, {evaluate(model, test, labels)}"
            print(f"codec step {run.step} {run.used_s:.0f} s {told}", flush=True)
            run.save()
    run.save()
    write_atomically(model.state_dict(), states / WEIGHTS.name)
