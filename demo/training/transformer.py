"""Stage 3: trains the demo's transformer on fresh scenes, first mostly on the small scales.

The small scales decide the layout and cost a twentieth of the tokens. The large ones are learned on random subsets of
their tokens, and at the end on all of them: what a token sees while pruned images are drawn is somewhere between.
`python -m demo.training.transformer` resumes from its last checkpoint.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.scenes import RICH, caption, held_out_scenes, training_scenes
from demo.text_features import TextFeatures
from demo.training import latent_codec
from demo.training.config import CONFIG, WEIGHTS
from demo.training.curve import Curve
from demo.training.latent_codec import SCHEDULES, LatentCodec
from demo.training.loop import Steps, TrainingRun, half_precision, optimizers, write_atomically, zero_bias
from demo.training.places import CURVES, STATES, TEXT_ENCODER
from demo.training.sample_images import accuracy, held_out, in_percent, sample_images, write_sheet
from demo.training.teacher_forcing import (
    Example,
    RunBlock,
    all_logits,
    bit_losses,
    make_example,
    random_subset,
    run_block,
)
from demo.training.team import Team, team
from fastvar.export.models.infinity.model import AttentivePool, InfinityTransformer
from fastvar.families.infinity import TransformerConfig

STATE = STATES / "transformer.pt"

SCALE_WEIGHTS = (2.0, 3.0, 5.0, 7.0, 8.0, 6.0, 6.0, 4.0, 4.0, 4.0)
FALLS_FROM = 0.7  # progress from which the learning rate falls: until then more steps can be asked for
MOST_PARTS = 8  # of a lesson
LARGEST_FLIP_RATE = 0.2
UNCONDITIONAL_RATE = 0.1
HELD_OUT_IMAGES, HELD_OUT_PART = 12, 2  # images whose loss is measured, and how many go through at once
LOG_EVERY, SAVE_EVERY, EVALUATE_EVERY = 20, 40, 1000  # steps


@dataclass(frozen=True)
class Lesson:
    """What one step trains: the first scales of an image size, all tokens or a random subset of the larger ones."""

    side: int
    scales: int
    batch: int
    kept: Mapping[int, int] = field(default_factory=dict)  # scale -> tokens; all where it is missing
    parts: int = 2  # the batch goes through in as many parts, each in one process


SMALL = Lesson(256, 5, 32)
MIDDLE = Lesson(256, 7, 24, {5: 64, 6: 96})
LARGE = Lesson(512, 10, 12, {5: 64, 6: 96, 7: 96, 8: 128, 9: 192})
WHOLE_256 = Lesson(256, 7, 16)
WHOLE_512 = Lesson(512, 10, 4, parts=4)
# progress from which -> lessons and their shares of the steps
CURRICULUM = (
    (0.0, ((SMALL, 0.8), (MIDDLE, 0.2))),
    (0.45, ((SMALL, 0.4), (MIDDLE, 0.3), (LARGE, 0.3))),
    (0.7, ((SMALL, 0.15), (MIDDLE, 0.15), (LARGE, 0.7))),
    (0.9, ((WHOLE_256, 0.4), (WHOLE_512, 0.6))),
)


def build(config: TransformerConfig = CONFIG) -> InfinityTransformer:
    """A fresh model: residual branches start small, gates at 0.6, logits near zero."""
    model = InfinityTransformer(config)
    branch_scale = (2 * config.depth) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            scale = branch_scale if name.endswith((".proj", ".fc2")) and "block" in name else 1.0
            nn.init.trunc_normal_(module.weight, std=scale * (3 * config.width) ** -0.5)
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


def lesson_of(progress: float, step: int) -> Lesson:
    """The same for a step whenever it is taken."""
    lessons = next(lessons for start, lessons in reversed(CURRICULUM) if progress >= start)
    shares = np.cumsum([share for _, share in lessons])
    return lessons[int(np.searchsorted(shares[:-1], np.random.default_rng((4, step)).random(), side="right"))][0]


@dataclass(frozen=True)
class Batch:
    """Latents [B, bits, h, w] of one image size, text features [B, T, Ct], mask [B, T]."""

    latent: Tensor
    features: Tensor
    mask: Tensor

    def split(self, parts: int) -> Iterator["Batch"]:
        for pieces in zip(*(t.chunk(parts) for t in (self.latent, self.features, self.mask)), strict=True):
            yield Batch(*pieces)


def padded(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """To the length that the model knows: the blocks are compiled for one length."""
    more = CONFIG.text_length - features.shape[1]
    assert more >= 0, f"a caption of {features.shape[1]} tokens"
    return F.pad(features, (0, 0, 0, more)), F.pad(mask, (0, more))


@dataclass(frozen=True)
class Teacher:
    """Makes batches of fresh scenes: drawn, encoded by the codec, and captioned."""

    codec: LatentCodec
    text: TextFeatures

    @torch.no_grad()
    def batch(self, side: int, count: int, seed: tuple[int, ...], held_out: bool = False) -> Batch:
        """The same for a seed; scenes that are trained on, or those that are not."""
        scenes = (
            held_out_scenes(count, seed[-1], RICH) if held_out else list(islice(training_scenes(seed, RICH), count))
        )
        rng = np.random.default_rng((*seed, 2))
        features, mask = padded(*self.text([caption(scene, rng) for scene in scenes]))
        _, latent = latent_codec.draw_and_encode(self.codec, scenes, seed, side)
        return Batch(latent, features, mask)


def without_text(features: Tensor, cfg_uncond: Tensor) -> Tensor:
    """Replace the text of random images by the learned unconditional rows."""
    drop = torch.rand(len(features), 1, 1) < UNCONDITIONAL_RATE
    return torch.where(drop, cfg_uncond[: features.shape[1]], features)


def lesson_losses(model: InfinityTransformer, batch: Batch, lesson: Lesson, block: RunBlock = run_block) -> Tensor:
    """Mean loss per bit of every scale of the lesson, on codes with mistakes and some images without their text."""
    flip_rate = torch.rand(len(batch.latent), 1, 1, 1) * LARGEST_FLIP_RATE
    example = make_example(batch.latent, flip_rate, SCHEDULES[lesson.side], lesson.scales)
    features = without_text(batch.features, model.cfg_uncond)
    return _losses(model, replace(batch, features=features), example, lesson, block)


@torch.no_grad()
def context_losses(model: InfinityTransformer, batch: Batch, lesson: Lesson) -> Tensor:
    """Held-out loss per bit of every scale without mistakes in the codes, in the context that the lesson gives."""
    none = torch.zeros(len(batch.latent), 1, 1, 1)
    example = make_example(batch.latent, none, SCHEDULES[lesson.side], lesson.scales)
    return _losses(model, batch, example, lesson, run_block)


def _losses(model: InfinityTransformer, batch: Batch, example: Example, lesson: Lesson, block: RunBlock) -> Tensor:
    indices: dict[int, Tensor] = {}
    if lesson.kept:
        example, indices = random_subset(example, dict(lesson.kept))
    with torch.autocast("cpu", torch.bfloat16):
        schedule = SCHEDULES[lesson.side]
        logits, scales = all_logits(model, batch.features, batch.mask, example, schedule, indices, block)
    return torch.stack(bit_losses(logits, scales, example))


def averaged_model(weights: dict[str, Tensor]) -> InfinityTransformer:
    """The model as it would be shipped: averaged weights, rounded to fp16."""
    model = InfinityTransformer(CONFIG).eval().requires_grad_(False)
    model.load_state_dict(half_precision(weights))
    return model


def held_out_losses(model: InfinityTransformer, teacher: Teacher, count: int) -> dict[str, float]:
    """Loss per bit over all context and over random subsets of it, mean of the scales that lessons thin out."""
    found = {}
    for whole, subset in ((WHOLE_256, MIDDLE), (WHOLE_512, LARGE)):
        batch = teacher.batch(whole.side, count, (5, 5), held_out=True)
        for name, lesson in (("full", whole), ("subset", subset)):
            parts = [context_losses(model, part, lesson) for part in batch.split(-(-count // HELD_OUT_PART))]
            found[f"{name}_{whole.side}"] = torch.stack(parts).mean(0)[min(subset.kept) :].mean().item()
    return found


def evaluate(weights: dict[str, Tensor], teacher: Teacher, count: int) -> dict[str, float]:
    """Accuracy of images of both sizes that are drawn for held-out captions, and held-out losses; writes sheets."""
    model, result = averaged_model(weights), {}
    for side in SCHEDULES:
        scenes, captions = held_out(count if side == min(SCHEDULES) else max(count // 4, 1), RICH)
        images = sample_images(model, teacher.codec.decode, teacher.text, captions, side)
        write_sheet(images, STATES / f"samples_{side}.png")
        shares = accuracy(images, scenes, RICH)
        print(f"{side}x{side}: {in_percent(shares)}", flush=True)
        result[f"overall_{side}"] = shares["overall"]
        result[f"shape_{side}"] = shares["shape"]
    return result | held_out_losses(model, teacher, min(count, HELD_OUT_IMAGES))


def train(team: Team, steps: int, lr: float, evaluated_captions: int, compiled: bool) -> None:
    """Train, resuming from the last checkpoint, and write the official file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build()
    matrices, others = parameter_groups(model)
    run = TrainingRun(model, optimizers(matrices, others, lr, 0.02, team), STATE, Steps(steps), 0.998, FALLS_FROM)
    teacher = Teacher(latent_codec.load(), TextFeatures(TEXT_ENCODER))
    block = torch.compile(run_block, dynamic=False) if compiled else run_block
    weights = torch.tensor(SCALE_WEIGHTS) / sum(SCALE_WEIGHTS)
    scale_columns = [f"scale_{i}" for i in range(len(SCALE_WEIGHTS))]
    measured = [f"{what}_{side}" for side in SCHEDULES for what in ("overall", "shape", "full", "subset")]
    curve = Curve(CURVES / "transformer.csv", (*scale_columns, *measured), run.step) if team.leads else None
    while run.progress < 1:
        lesson = lesson_of(run.progress, run.step)
        losses = torch.zeros(lesson.scales)
        for part in team.parts(lesson.parts):
            batch = teacher.batch(lesson.side, lesson.batch // lesson.parts, (3, run.step, part))
            torch.manual_seed(run.step * MOST_PARTS + part)
            own = lesson_losses(model, batch, lesson, block) / lesson.parts
            (weights[: lesson.scales] * own).sum().backward()
            losses += own.detach()
        team.add_up([*matrices, *others], losses)
        nn.utils.clip_grad_norm_(others, 1.0)
        run.update()
        if curve is None:
            continue
        curve.add(dict(zip(scale_columns, losses.tolist(), strict=False)))
        if run.step % EVALUATE_EVERY == 0:
            curve.add(evaluate(run.averaged, teacher, evaluated_captions))
        if run.step % LOG_EVERY == 0:
            print(curve.write(run.step, run.used_s), flush=True)
        if run.step % SAVE_EVERY == 0:
            run.save()
    if curve is None:
        return
    run.save()
    write_atomically(half_precision(run.averaged), WEIGHTS)
    print(evaluate(run.averaged, teacher, 3 * evaluated_captions), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--evaluated-captions", type=int, default=32)
    parser.add_argument("--processes", type=int, default=1, choices=range(1, SMALL.parts + 1))
    parser.add_argument("--meeting", default="", help="of a process that another one has started")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks; a fifth slower, needs no g++")
    args = parser.parse_args()
    shared = ["--steps", str(args.steps), "--lr", str(args.lr), *(["--eager"] if args.eager else [])]
    with team("demo.training.transformer", shared, args.processes, args.meeting) as own:
        train(own, args.steps, args.lr, args.evaluated_captions, not args.eager)
