"""Stage 3: trains the demo's transformer on prepared latents, first mostly on the small scales.

The small scales decide the layout and cost a quarter of the tokens; the last two are learned on random
subsets of their tokens. `python -m demo.training.transformer` resumes from its last checkpoint.
"""

import argparse
import time
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from demo.scenes import Scene, caption
from demo.text_features import TextFeatures
from demo.training.config import CONFIG, ROOT, WEIGHTS
from demo.training.latents import LATENTS
from demo.training.loop import TrainingRun, Workers, half_precision, optimizers, write_atomically, zero_bias
from demo.training.sample_images import accuracy, held_out, in_percent, load_tokenizer, sample_images, write_sheet
from demo.training.teacher_forcing import all_logits, bit_losses, make_example, random_subset
from fastvar.export.models.infinity.model import AttentivePool, InfinityTransformer

STATE = ROOT / "out" / "training" / "transformer.pt"

BATCH = 32
SCALE_WEIGHTS = (2.0, 3.0, 5.0, 7.0, 8.0, 6.0, 6.0)
LARGEST_FLIP_RATE = 0.2
UNCONDITIONAL_RATE = 0.1
# progress from which -> share of batches with all seven scales, tokens kept at scales 5 and 6
STAGES = ((0.0, 0.15, (48, 64)), (0.6, 0.4, (64, 96)))
SMALL_SCALES = 5
EVALUATE_EVERY_S = 600


def build() -> InfinityTransformer:
    """A fresh model: residual branches start small, gates at 0.6, logits near zero."""
    model = InfinityTransformer(CONFIG)
    branch_scale = (2 * CONFIG.depth) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            scale = branch_scale if name.endswith((".proj", ".fc2")) and "block" in name else 1.0
            nn.init.trunc_normal_(module.weight, std=scale * (3 * CONFIG.width) ** -0.5)
            zero_bias(module)
    with torch.no_grad():
        nn.init.normal_(model.cfg_uncond, std=0.1)
        nn.init.normal_(model.pos_start, std=0.02)
        nn.init.normal_(cast(AttentivePool, model.text_proj_for_sos["ca"]).mat_q, std=0.1)
        nn.init.normal_(model.word_embed.weight, std=0.3)
        nn.init.normal_(model.lvl_embed.weight, std=0.2)
        for linear in (model.shared_ada_lin[1], model.head_nm.ada_lin[1], model.head):
            cast(nn.Linear, linear).weight.mul_(0.1)
        for block in model.layers:
            block.ada_gss[:, :, :2] = 0.6
    return model


def parameter_groups(model: InfinityTransformer) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices, for Muon, and everything else."""
    outer = ("head.", "word_embed.", "lvl_embed.", "cfg_uncond", "pos_start")
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith(outer)]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]


class Batches:
    """Random batches of latents with fresh captions."""

    def __init__(self) -> None:
        saved = torch.load(LATENTS, weights_only=False)
        self.latents: Tensor = saved["latents"]
        self.scenes: list[Scene] = saved["scenes"]
        self.text = TextFeatures()

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [B, bits, h, w] fp32, text features [B, T, Ct], mask [B, T]."""
        chosen = rng.choice(len(self.scenes), count, replace=False)
        features, mask = self.text([caption(self.scenes[i], rng) for i in chosen])
        return self.latents[torch.from_numpy(chosen)].float(), features, mask


def without_text(features: Tensor, cfg_uncond: Tensor) -> Tensor:
    """Replace the text of random images by the learned unconditional rows."""
    drop = torch.rand(len(features), 1, 1) < UNCONDITIONAL_RATE
    return torch.where(drop, cfg_uncond[: features.shape[1]], features)


def stage_of(progress: float, step: int) -> dict[int, int] | None:
    """None: this step trains the small scales only; else all seven, with so many tokens of each large one."""
    _, share, kept = next(stage for stage in reversed(STAGES) if progress >= stage[0])
    if np.random.default_rng(step).random() >= share:
        return None
    return dict(zip(range(SMALL_SCALES, len(SCALE_WEIGHTS)), kept, strict=True))


def training_losses(
    model: InfinityTransformer,
    batches: Batches,
    count: int,
    kept: dict[int, int] | None,
    rng: np.random.Generator,
) -> Tensor:
    """Mean loss per bit of every trained scale, on `count` random images."""
    latent, features, mask = batches.draw(count, rng)
    flip_rate = torch.rand(count, 1, 1, 1) * LARGEST_FLIP_RATE
    example = make_example(latent, flip_rate, len(SCALE_WEIGHTS) if kept else SMALL_SCALES)
    indices: dict[int, Tensor] = {}
    if kept:
        example, indices = random_subset(example, kept)
    logits, scales = all_logits(model, without_text(features, model.cfg_uncond), mask, example, indices)
    return torch.stack(bit_losses(logits, scales, example))


def evaluate(weights: dict[str, Tensor], batches: Batches, count: int) -> str:
    """Accuracy of sampled images on held-out captions; writes a sheet."""
    model = InfinityTransformer(CONFIG).eval()
    model.load_state_dict(half_precision(weights))
    scenes, captions = held_out(count)
    images = sample_images(model, load_tokenizer().decode, batches.text, captions)
    write_sheet(images)
    return in_percent(accuracy(images, scenes))


class Progress:
    """Prints the mean loss of every scale since the last line."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.history: list[list[float]] = [[] for _ in SCALE_WEIGHTS]

    def add(self, losses: Tensor) -> None:
        for values, loss in zip(self.history, losses.tolist(), strict=False):
            values.append(loss)

    def print(self, run: TrainingRun) -> None:
        means = " ".join(f"{np.mean(values):.3f}" if values else "-" for values in self.history)
        print(f"step {run.step} {run.used_s:.0f} s loss by scale {means}", flush=True)
        self.clear()


def train(minutes: float, lr: float, evaluated_captions: int) -> None:
    torch.manual_seed(0)
    model = build()
    matrices, others = parameter_groups(model)
    workers = Workers(model)
    tools = optimizers(matrices, others, lr, decay=0.02, pool=workers.pool)
    run = TrainingRun(model, tools, STATE, minutes, average=0.995)
    batches, progress = Batches(), Progress()
    rngs = np.random.default_rng(run.step).spawn(workers.count)
    weights = torch.tensor(SCALE_WEIGHTS) / sum(SCALE_WEIGHTS)
    evaluated = time.monotonic()
    while run.progress < 1:
        kept = stage_of(run.progress, run.step)
        used = weights[: len(SCALE_WEIGHTS) if kept else SMALL_SCALES]

        def part_losses(part: int, kept: dict[int, int] | None = kept, used: Tensor = used) -> Tensor:
            return used * training_losses(model, batches, BATCH // workers.count, kept, rngs[part])

        losses = workers.backward(part_losses)
        nn.utils.clip_grad_norm_(others, 1.0)
        run.update()
        progress.add(losses / used)
        if run.step % 25 == 0:
            progress.print(run)
            run.save()
        if time.monotonic() - evaluated > EVALUATE_EVERY_S:
            run.save()
            print(f"step {run.step}: {evaluate(run.averaged, batches, evaluated_captions)}", flush=True)
            run.resume_clock()
            evaluated = time.monotonic()
    run.save()
    write_atomically(half_precision(run.averaged), WEIGHTS)
    print(f"done at step {run.step}: {evaluate(run.averaged, batches, 96)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--evaluated-captions", type=int, default=32)
    args = parser.parse_args()
    train(args.minutes, args.lr, args.evaluated_captions)
