"""How an image grows: a picture of one, scale by scale with the tokens that pruning keeps; and an animation of several.

`python -m demo.growth`. Drawn by the torch reference with the engines' noise, for engines do not tell what is inside.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from demo.bands import wrapped_lines
from demo.bundles import CHECKPOINT, OUT, SAMPLING, add_side, exit_on_user_error
from demo.draw_scene import Pixels
from demo.poster import INK, PAPER, SOFT
from demo.sheet import IMAGE_SEED, SCENE_SEED, held_out_captions
from demo.text_features import TextFeatures
from fastvar.core.noise import uniform_noise
from fastvar.core.plan import GenerationPlan, StepPlan, make_plan
from fastvar.core.schedule import Size
from fastvar.export.checkpoints.checkpoint import load_checkpoint
from fastvar.export.models.infinity.model import InfinityTransformer
from fastvar.export.models.infinity.reference import Sampling, generate_scales
from fastvar.export.models.infinity.tokenizer import ImageTokenizer
from fastvar.families.infinity import INFINITY, ImageTokenizerConfig, TransformerConfig
from fastvar.families.infinity_presets import schedule_for

TILE = 192  # pixels along one side of an image
FADED = 0.22  # of a token that no layer computes anew
FRAME_MS, LAST_FRAME_MS = 450, 1800
ANIMATED = 6  # prompts side by side


@dataclass(frozen=True)
class Growth:
    """One scale: the image so far, and for each of its tokens the share of pruned sub-layers that computed it anew."""

    step: StepPlan
    image: Pixels
    computed: NDArray[np.float64]  # [h, w] of the scale's tokens, 1 where nothing is pruned


class Gardener:
    """A checkpoint in torch, which shows every scale of what it draws."""

    def __init__(self, checkpoint: Path, policy: str, side: int) -> None:
        loaded = load_checkpoint(checkpoint)
        assert isinstance(loaded.transformer, TransformerConfig)
        assert isinstance(loaded.image_tokenizer, ImageTokenizerConfig)
        self.model = InfinityTransformer(loaded.transformer).eval().requires_grad_(False)
        self.model.load_state_dict({name: weight.float() for name, weight in loaded.transformer_weights.items()})
        self.tokenizer = ImageTokenizer(loaded.image_tokenizer).eval().requires_grad_(False)
        weights = {name: weight.float() for name, weight in loaded.image_tokenizer_weights.items()}
        self.tokenizer.load_state_dict(weights)
        self.text = TextFeatures(checkpoint / "text_encoder")
        schedule, depth = schedule_for((side, side)), loaded.transformer.depth
        self.plan: GenerationPlan = make_plan(schedule, INFINITY.policy(policy, schedule, depth), depth)

    @torch.no_grad()
    def grow(self, prompt: str, seed: int) -> Iterator[Growth]:
        """Every executed scale."""
        features, mask = self.text([prompt])
        uncond = self.model.cfg_uncond[None, : features.shape[1]]
        traces = generate_scales(
            self.model,
            torch.cat((features, uncond)),
            mask.repeat(2, 1),
            self.plan,
            lambda scale, shape: torch.from_numpy(uniform_noise(seed, scale, shape)),
            Sampling(SAMPLING.guidance_scale, SAMPLING.tau or 1.0, SAMPLING.top_p),
        )
        for trace in traces:
            decoded = self.tokenizer.decode(trace.summed_codes)[0].clamp(-1, 1)
            image = ((decoded.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
            kept = [own[0].numpy() for state in trace.states for own in state.kept.values()]
            yield Growth(trace.step, image, computed_share(trace.step, kept))


def computed_share(step: StepPlan, kept: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """How often each token [h, w] is among the lists of kept tokens, as a share of the lists; 1 without pruning."""
    if not step.prunes:
        return np.ones(step.size)
    counts = np.bincount(np.concatenate(kept), minlength=step.tokens)
    return (counts / len(kept)).reshape(step.size)


def marked(growth: Growth, side: int) -> Image.Image:
    """The image with the tokens that pruning left out faded to paper, and the grid of tokens over it."""
    image = np.asarray(Image.fromarray(growth.image).resize((side, side), Image.Resampling.LANCZOS), np.float64)
    strength = FADED + (1 - FADED) * stretched(growth.computed, (side, side))[..., None]
    blended = Image.fromarray(np.rint(image * strength + np.array(PAPER) * (1 - strength)).astype(np.uint8))
    draw = ImageDraw.Draw(blended, "RGBA")
    for count, horizontal in zip(growth.step.size, (True, False), strict=True):
        for i in range(1, count):
            at = i * side / count
            draw.line([(0, at), (side, at)] if horizontal else [(at, 0), (at, side)], (128, 128, 128, 90))
    return blended


def stretched(values: NDArray[np.float64], size: Size) -> NDArray[np.float64]:
    """Each value over its rectangle of a larger grid [H, W]."""
    rows, columns = ((np.arange(side) * count) // side for side, count in zip(size, values.shape, strict=True))
    return values[np.ix_(rows, columns)]


def scales_picture(growths: Sequence[Growth], caption: str) -> Image.Image:
    """One column a scale: its grid, the image after it, and what of it was computed."""
    gap, margin, line = 14, 40, 24
    head, text, small = (ImageFont.load_default(size) for size in (26, 18, 15))
    width = 2 * margin + len(growths) * (TILE + gap) - gap
    top = margin + 2 * line + 34
    picture = Image.new("RGB", (width, top + 2 * TILE + gap + 3 * line + margin), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((margin, margin - 12), caption, INK, head)
    explained = "above: the image after every scale; below: what its tokens are, and faded those that pruning restores"
    draw.text((margin, margin + 26), wrapped_lines(explained, text, width - 2 * margin)[0], SOFT, text)
    for i, growth in enumerate(growths):
        x, step = margin + i * (TILE + gap), growth.step
        tile = Image.fromarray(growth.image).resize((TILE, TILE), Image.Resampling.LANCZOS)
        picture.paste(tile, (x, top))
        picture.paste(marked(growth, TILE), (x, top + TILE + gap))
        y = top + 2 * TILE + gap + 8
        draw.text((x, y), f"scale {step.index + 1}: {step.size[1]}x{step.size[0]}", INK, text)
        kept = f"{step.kept} of {step.tokens} tokens" if step.prunes else f"all tokens: {step.tokens}"
        draw.text((x, y + line), kept, SOFT, small)
    return picture


def frames(columns: Sequence[Sequence[Growth]], side: int) -> list[Image.Image]:
    """The prompts side by side, one frame a scale."""
    gap = side // 16
    pictures = []
    for together in zip(*columns, strict=True):
        frame = Image.new("RGB", (len(together) * (side + gap) + gap, side + 2 * gap), PAPER)
        for i, growth in enumerate(together):
            tile = Image.fromarray(growth.image).resize((side, side), Image.Resampling.LANCZOS)
            frame.paste(tile, (gap + i * (side + gap), gap))
        pictures.append(frame)
    return pictures


def write_animation(pictures: Sequence[Image.Image], file: Path) -> None:
    """An endless animated WebP that rests on its last frame."""
    durations = [FRAME_MS] * (len(pictures) - 1) + [LAST_FRAME_MS]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=88, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder in the official format")
    parser.add_argument("--policy", default="fastvar", help="which tokens are pruned")
    parser.add_argument("--prompt", help="of the picture of scales; by default one of the sheet's")
    parser.add_argument("--picture", type=Path, default=OUT / "scales.png", help="where it goes")
    parser.add_argument("--animation", type=Path, default=OUT / "growing.webp", help="where the animation goes")
    add_side(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gardener = Gardener(arguments.checkpoint, arguments.policy, arguments.side)
    captions = held_out_captions(ANIMATED, SCENE_SEED)
    columns = [list(gardener.grow(caption, IMAGE_SEED + i)) for i, caption in enumerate(captions)]
    prompt = arguments.prompt or captions[0]
    shown = list(gardener.grow(prompt, IMAGE_SEED)) if arguments.prompt else columns[0]
    for file in (arguments.picture, arguments.animation):
        file.parent.mkdir(parents=True, exist_ok=True)
    scales_picture(shown, prompt).save(arguments.picture, optimize=True)
    write_animation(frames(columns, TILE), arguments.animation)
    for file in (arguments.picture, arguments.animation):
        print(f"wrote {file}, {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    exit_on_user_error(main)
