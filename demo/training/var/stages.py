"""Trains the demo's class-conditional model: the official tokenizer on the codec's latents, then the transformer.

Teacher forcing by the family's own training forward (export/models/var/reference.py). The folder that it writes is in
the official layout. `python -m demo.training.var` runs all stages; each resumes where it stopped.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.training.image_tokenizer import cut, pixel_loss, windows
from demo.training.image_tokenizer import initialize as unit_gain
from demo.training.loop import (
    Minutes,
    TrainingRun,
    half_precision,
    matrices_and_others,
    optimizers,
    write_atomically,
    zero_bias,
)
from demo.training.patch_codec import PATCH, images_of, psnr
from demo.training.var.codec import CLASSES, STATES, TOKENIZER, VqCodec, draw_classes, read_class, to_pixels
from demo.training.var.codec import load as load_codec
from fastvar.export.checkpoints.published import CLASS_NAMES
from fastvar.export.models.codebook.reference import teacher_inputs
from fastvar.export.models.codebook.tokenizer import VqTokenizer
from fastvar.export.models.var.model import VarTransformer
from fastvar.export.models.var.reference import teacher_logits
from fastvar.families.var import VarConfig

OUT = Path(__file__).parents[2] / "out" / "var"
CONFIG = VarConfig(
    depth=6,
    width=192,
    heads=3,
    mlp_width=768,
    classes=len(CLASSES),
    codes=TOKENIZER.codes,
    code_channels=TOKENIZER.code_channels,
)
IMAGES = 4000  # whose token maps are made before the transformer is trained
SMALL_SCALES = 7  # 1 to 8: they decide the layout, and are less than a quarter of the tokens
# progress from which -> share of batches with all scales
STAGES = ((0.0, 0.1), (0.45, 0.6))
BATCH, WHOLE_BATCH = 32, 12
UNCONDITIONAL_RATE = 0.1
WHOLE_IMAGES_FROM = 0.85  # progress from which the decoder sees whole images: their normalisation statistics count
SAVE_EVERY_S = 60


def half_floats() -> torch.autocast:
    """bf16 products, fp32 weights: twice the speed on CPUs that have them."""
    return torch.autocast("cpu", torch.bfloat16)


@dataclass(frozen=True)
class TokenizerData:
    """Fresh scenes, and what the codec makes of them."""

    codec: VqCodec
    rng: np.random.Generator

    def decoder_loss(self, model: VqTokenizer, progress: float) -> Tensor:
        """Pixel loss of what the decoder makes of the quantised codes."""
        _, scenes = draw_classes(4 if progress < WHOLE_IMAGES_FROM else 1, self.rng)
        target = images_of(scenes, self.rng)
        codes = self.codec.sums(self.codec.token_maps(self.codec.encode(target)))[-1]
        if progress < WHOLE_IMAGES_FROM:
            corners = windows(scenes, self.rng)
            codes, target = cut(codes, corners, 1), cut(target, corners, PATCH)
        with half_floats():
            decoded = model.decoder(model.post_quant_conv(codes))
        return pixel_loss(decoded, target)

    def encoder_loss(self, model: VqTokenizer, _: float) -> Tensor:
        """Squared error of the latents."""
        images = images_of(draw_classes(4, self.rng)[1], self.rng)
        with half_floats():
            latent = model.encode(images)
        return (latent.float() - self.codec.encode(images)).square().mean() * TOKENIZER.code_channels


HALVES = {"decoder": ("post_quant_conv", "decoder"), "encoder": ("encoder", "quant_conv")}


def train_tokenizer(half: str, minutes: float, out: Path = OUT, states: Path = STATES) -> None:
    """Fit one half of the official tokenizer to the codec; the other half of the saved file stays as it is."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VqTokenizer(TOKENIZER)
    parts = nn.ModuleDict({name: getattr(model, name) for name in HALVES[half]})
    unit_gain(parts)
    run = TrainingRun(
        parts,
        optimizers(*matrices_and_others(parts), 2e-3, 0.0),
        states / f"{half}.pt",
        Minutes(minutes),
        0.98 if half == "encoder" else 0.99,
    )
    data = TokenizerData(load_codec(), np.random.default_rng(run.step))
    loss_of: Callable[[VqTokenizer, float], Tensor] = getattr(data, f"{half}_loss")
    saved, losses = time.monotonic(), []
    while run.progress < 1:
        loss = loss_of(model, run.progress)
        loss.backward()
        run.update()
        losses.append(loss.item())
        if time.monotonic() - saved > SAVE_EVERY_S:
            print(f"{half} step {run.step} {run.used_s:.0f} s loss {np.mean(losses):.4f}", flush=True)
            run.save()
            write_tokenizer(data.codec, run.averaged, out)
            saved, losses = time.monotonic(), []
    run.save()
    write_tokenizer(data.codec, run.averaged, out)
    print(f"{half} step {run.step}: {evaluate_tokenizer(data.codec, out)}", flush=True)


def write_tokenizer(codec: VqCodec, half: dict[str, Tensor], out: Path) -> None:
    """Put the quantiser and one trained half into the official file, rounded to fp16."""
    file = out / "image_tokenizer.pth"
    state = half_precision(VqTokenizer(TOKENIZER).state_dict()) if not file.exists() else torch.load(file)
    quantizer = {f"quantize.{name}": tensor for name, tensor in codec.quantizer.state_dict().items()}
    write_atomically(state | half_precision(half) | half_precision(quantizer), file)


def load_tokenizer(out: Path = OUT) -> VqTokenizer:
    """The trained tokenizer in fp32, without gradients."""
    model = VqTokenizer(TOKENIZER).eval().requires_grad_(False)
    model.load_state_dict({name: tensor.float() for name, tensor in torch.load(out / "image_tokenizer.pth").items()})
    return model


@torch.no_grad()
def evaluate_tokenizer(codec: VqCodec, out: Path, count: int = 36) -> str:
    """How well the official decoder draws the codec's codes, and how far its encoder is from the codec."""
    rng, model = np.random.default_rng(1), load_tokenizer(out)
    labels, scenes = draw_classes(count, rng)
    images = images_of(scenes, rng)
    latent = codec.encode(images)
    decoded = torch.cat([model.decode(codes) for codes in codec.sums(codec.token_maps(latent))[-1].split(4)])
    read = np.mean([read_class(p) == c for p, c in zip(to_pixels(decoded), labels, strict=True)])
    decibels = np.median([psnr(*pair) for pair in zip(decoded, images, strict=True)])
    off = F.mse_loss(model.encode(images), latent).sqrt() / latent.std()
    return f"decoder {decibels:.2f} dB, classes read back {read:.3f}; encoder off by {off:.3f} of the latents' spread"


@dataclass(frozen=True)
class Example:
    """Images as the transformer is taught by them: N counts images, L tokens of all scales."""

    labels: Tensor  # [N] int64
    inputs: Tensor  # [N, L - 1, code_channels]
    targets: Tensor  # [N, L] int64

    def batch(self, count: int, scales: int, rng: np.random.Generator, config: VarConfig) -> "Example":
        """Random images, the first scales alone."""
        chosen = torch.from_numpy(rng.choice(len(self.labels), count, replace=False))
        length = config.first_token(scales)
        return Example(
            self.labels[chosen], self.inputs[chosen, : length - 1].float(), self.targets[chosen, :length].long()
        )


@torch.no_grad()
def make_examples(codec: VqCodec, count: int, seed: int) -> Example:
    """Token maps of random scenes."""
    rng, labels, inputs, targets = np.random.default_rng(seed), [], [], []
    for _ in range(0, count, 20):
        own, scenes = draw_classes(min(20, count), rng)
        maps = codec.token_maps(codec.encode(images_of(scenes, rng)))
        labels.append(torch.from_numpy(own))
        inputs.append(teacher_inputs(codec.quantizer, maps).half())
        targets.append(torch.cat([m.flatten(1) for m in maps], dim=1).to(torch.int16))
    return Example(torch.cat(labels), torch.cat(inputs), torch.cat(targets))


def build(config: VarConfig = CONFIG) -> VarTransformer:
    """A fresh model: residual branches start small, gates at 0.6, logits near zero, positions as sines and cosines."""
    model = VarTransformer(config)
    branch_scale = (2 * config.depth) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            scale = branch_scale if name.endswith((".proj", ".fc2")) else 1.0
            nn.init.trunc_normal_(module.weight, std=scale * (3 * config.width) ** -0.5)
            zero_bias(module)
    with torch.no_grad():
        nn.init.normal_(model.pos_start, std=0.02)
        nn.init.normal_(model.class_emb.weight, std=0.5)
        nn.init.normal_(model.word_embed.weight, std=0.5)
        nn.init.normal_(model.lvl_embed.weight, std=0.2)
        model.pos_1LC.copy_(0.3 * waves(config))
        modulations = [cast(nn.Linear, block.ada_lin[1]) for block in model.layers]
        for linear in (model.head, cast(nn.Linear, model.head_nm.ada_lin[1]), *modulations):
            linear.weight.mul_(0.1)
        for linear in modulations:
            linear.bias[: 2 * config.width] = 0.6
    return model


def waves(config: VarConfig) -> Tensor:
    """A first position embedding [1, L, C]: sines and cosines of a token's place in the image, of rising frequency.

    Equal places of different scales look alike.
    """
    bands = config.width // 4
    frequency = np.pi * 16 ** (torch.arange(bands) / max(bands - 1, 1))
    rows = []
    for side in config.scales:
        middle = (torch.arange(side) + 0.5) / side
        phase = middle.unsqueeze(1) * frequency  # [side, bands]
        wave = torch.cat((phase.sin(), phase.cos()), dim=1)
        y, x = wave.unsqueeze(1).expand(-1, side, -1), wave.unsqueeze(0).expand(side, -1, -1)
        rows.append(torch.cat((y, x), dim=-1).flatten(0, 1))
    out = torch.zeros(config.tokens, config.width)
    out[:, : 4 * bands] = torch.cat(rows)
    return out.unsqueeze(0)


def parameter_groups(model: VarTransformer) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices, for Muon, and everything else."""
    outer = ("head.", "word_embed.", "lvl_embed.", "class_emb.")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith(outer)]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


def losses(model: VarTransformer, example: Example, unconditional_rate: float = UNCONDITIONAL_RATE) -> list[Tensor]:
    """Cross-entropy of every scale, with the class of random images withheld."""
    config = model.config
    drop = torch.rand(len(example.labels)) < unconditional_rate
    labels = torch.where(drop, config.classes, example.labels)
    with half_floats():
        logits = teacher_logits(model, labels, example.inputs).float()
    ends = [config.first_token(i) for i in range(1, config.max_scales + 1)]
    parts = [side * side for side, end in zip(config.scales, ends, strict=True) if end <= logits.shape[1]]
    pairs = zip(logits.split(parts, dim=1), example.targets.split(parts, dim=1), strict=True)
    return [F.cross_entropy(own.flatten(0, 1), target.flatten()) for own, target in pairs]


def scales_of(progress: float, step: int, config: VarConfig) -> int:
    """How many scales this step trains: the small ones, or all."""
    share = next(share for start, share in reversed(STAGES) if progress >= start)
    return config.max_scales if np.random.default_rng(step).random() < share else min(SMALL_SCALES, config.max_scales)


def train_transformer(
    minutes: float,
    codec: VqCodec,
    config: VarConfig = CONFIG,
    images: int = IMAGES,
    out: Path = OUT,
    states: Path = STATES,
) -> None:
    """Train and write the checkpoint, every minute and at the end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(config)
    matrices, others = parameter_groups(model)
    run = TrainingRun(
        model, optimizers(matrices, others, 3e-3, decay=0.02), states / "transformer.pt", Minutes(minutes), 0.99
    )
    examples, rng = make_examples(codec, images, seed=run.step), np.random.default_rng(run.step)
    run.resume_clock()
    history: list[list[float]] = [[] for _ in config.scales]
    saved = time.monotonic()
    while run.progress < 1:
        scales = scales_of(run.progress, run.step, config)
        count = min(WHOLE_BATCH if scales > SMALL_SCALES else BATCH, images)
        own = losses(model, examples.batch(count, scales, rng, config))
        weights = torch.tensor(config.scales[:scales], dtype=torch.float32)  # the root of a scale's tokens
        (torch.stack(own) * weights / sum(config.scales)).sum().backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        run.update()
        for values, loss in zip(history, own, strict=False):
            values.append(loss.item())
        if time.monotonic() - saved > SAVE_EVERY_S:
            means = " ".join(f"{np.mean(values):.2f}" if values else "-" for values in history)
            print(f"transformer step {run.step} {run.used_s:.0f} s loss by scale {means}", flush=True)
            run.save()
            write_transformer(run.averaged, out, config)
            history, saved = [[] for _ in config.scales], time.monotonic()
    run.save()
    write_transformer(run.averaged, out, config)


def write_transformer(weights: dict[str, Tensor], out: Path, config: VarConfig = CONFIG) -> None:
    """The official file, rounded to fp16, and the names of the classes."""
    write_atomically(half_precision(weights), out / "transformer.pth")
    names = (CLASSES * config.classes)[: config.classes]
    (out / CLASS_NAMES).write_text(json.dumps(names, indent=1) + "\n")
