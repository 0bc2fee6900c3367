"""Samples images for many captions at once in torch and reads them back: the training's own yardstick.

`python -m demo.training.sample_images` scores the weights that the training wrote, dense and pruned.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.read_scene import ATTRIBUTES, read_scene, score
from demo.scenes import RICH, Scene, World, caption, held_out_scenes
from demo.text_features import TextFeatures
from demo.training import latent_codec
from demo.training.image_tokenizer import load as load_tokenizer
from demo.training.latent_codec import SCHEDULES
from demo.training.places import STATES, TEXT_ENCODER
from fastvar.core.plan import GenerationPlan, make_plan
from fastvar.export.models.common.tokenizer_blocks import enlarge
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.export.models.infinity.reference import Sampling, run_layers, sample_bits
from fastvar.export.models.infinity.tokenizer import bits_to_codes
from fastvar.export.models.transformer.pruning import LayerState
from fastvar.families.infinity import INFINITY

SAMPLING = Sampling(guidance_scale=1.5, tau=0.5)  # 3 exaggerates kinds: sides of squares drawn in, thin stars
ROWS = 16  # captions per batch


@torch.no_grad()
def sample_codes(
    model: InfinityTransformer,
    features: Tensor,
    mask: Tensor,
    plan: GenerationPlan,
    sampling: Sampling,
    generator: torch.Generator,
) -> Tensor:
    """Text features [B, T, Ct], mask [B, T] -> summed codes [B, bits, h, w]; guidance doubles the rows."""
    B, T, _ = features.shape
    rows = torch.cat((features, model.cfg_uncond[:T].expand(B, -1, -1)))
    conditioning = model.conditioning(rows, mask.repeat(2, 1))
    states = [LayerState() for _ in model.layers]
    x = model.first_tokens(conditioning.sos)
    bits_per_token = model.config.code_channels
    summed = torch.zeros(B, bits_per_token, *plan.schedule.final)
    for step in plan.steps:
        out = run_layers(model, x, conditioning, plan, step, states)[-1]
        with_text, without = (model.logits(out, conditioning.sos) / sampling.tau).chunk(2)
        logits = sampling.guidance_scale * with_text + (1 - sampling.guidance_scale) * without
        uniform = torch.rand(B, step.tokens, bits_per_token, generator=generator)
        bits = sample_bits(logits, uniform, sampling.top_p)  # [B, L, bits]
        grid = bits.transpose(1, 2).unflatten(2, step.size)
        summed = summed + enlarge(bits_to_codes(grid), plan.schedule.final)
        if step.next_index is not None:
            following = enlarge(summed, plan.schedule.sizes[step.next_index])
            x = model.embed(following).repeat(2, 1, 1)
    return summed


@torch.no_grad()
def sample_images(
    model: InfinityTransformer,
    decode: Callable[[Tensor], Tensor],
    text: TextFeatures,
    captions: list[str],
    side: int = 256,
    policy: str = "dense",
    sampling: Sampling = SAMPLING,
) -> np.ndarray:
    """uint8 [N, H, W, 3]; the same captions give the same images."""
    schedule = SCHEDULES[side]
    plan = make_plan(schedule, INFINITY.policy(policy, schedule, model.config.depth), model.config.depth)
    rows = ROWS * min(SCHEDULES) ** 2 // side**2  # as many tokens whatever the size
    generator = torch.Generator().manual_seed(0)
    images = []
    for i in range(0, len(captions), rows):
        features, mask = text(captions[i : i + rows])
        images.append(decode(sample_codes(model, features, mask, plan, sampling, generator)).clamp(-1, 1))
    return ((torch.cat(images).permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()


def accuracy(images: np.ndarray, scenes: list[Scene], world: World) -> dict[str, float]:
    """Share of attributes read back rightly, by name; "overall" counts every single check alike."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for image, scene in zip(images, scenes, strict=True):
        for name, (hits, count) in score(read_scene(image, world), scene).items():
            right[name] += hits
            total[name] += count
    result = {name: right[name] / max(1, total[name]) for name in ATTRIBUTES}
    return {"overall": right.total() / total.total(), **result}


def held_out(count: int, world: World) -> tuple[list[Scene], list[str]]:
    """Scenes never trained on, with one caption each."""
    scenes = held_out_scenes(count, 2, world)
    rng = np.random.default_rng(2)
    return scenes, [caption(scene, rng) for scene in scenes]


def write_sheet(images: np.ndarray, file: Path, columns: int = 6) -> None:
    """The first images on one sheet."""
    columns = min(columns, len(images))
    rows = [np.concatenate(list(images[i : i + columns]), axis=1) for i in range(0, len(images), columns)]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape][:4])).save(file)


def in_percent(result: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in result.items())


def main() -> None:
    from demo.training.config import load as load_transformer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--guidance", type=float, default=SAMPLING.guidance_scale)
    parser.add_argument("--tau", type=float, default=SAMPLING.tau)
    parser.add_argument("--policies", nargs="+", default=["dense", "fastvar"])
    parser.add_argument("--side", type=int, choices=list(SCHEDULES), default=256, help="of the images, in pixels")
    parser.add_argument("--codec", action="store_true", help="decode with the patch codec")
    args = parser.parse_args()
    model, text = load_transformer(), TextFeatures(TEXT_ENCODER)
    decode = latent_codec.load().decode if args.codec else load_tokenizer().decode
    scenes, captions = held_out(args.count, RICH)
    for policy in args.policies:
        sampling = Sampling(guidance_scale=args.guidance, tau=args.tau)
        images = sample_images(model, decode, text, captions, args.side, policy, sampling)
        print(f"{policy}: {in_percent(accuracy(images, scenes, RICH))}", flush=True)
        write_sheet(images, STATES / f"samples_{args.side}_{policy}.png")


if __name__ == "__main__":
    main()
