"""`make demo`: nine captions that were never trained on, drawn dense and pruned at equal seeds, on one sheet."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from demo.bundles import CHECKPOINT, OUT, ensure_bundles, exit_on_user_error
from demo.measuring.speed import measure, scale_table, summarize
from demo.scenes import caption, held_out_scenes
from fastvar import Pipeline
from fastvar.profiling.environment import environment

COLUMNS, PROMPTS = 3, 9
SCENE_SEED, IMAGE_SEED = 3, 7
TIMED_RUNS = 9
GAP, MARGIN = 12, 34  # pixels
FONT_SIZE, LINE = 15, 19
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
INK, PAPER = (30, 30, 30), (255, 255, 255)


def held_out_captions(count: int, seed: int) -> list[str]:
    """Captions of scenes that no training saw."""
    rng = np.random.default_rng(seed)
    return [caption(scene, rng) for scene in held_out_scenes(count, seed)]


def compose(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Bands of `COLUMNS` captions: in each one row of images for every label, then the captions under them."""
    side = next(iter(rows.values()))[0].width
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = [_wrap(text, font, side) for text in captions]
    text_height = LINE * max(len(lines) for lines in wrapped)
    band = len(rows) * (side + GAP) + text_height + GAP
    bands = -(-len(captions) // COLUMNS)
    sheet = Image.new("RGB", (MARGIN + COLUMNS * (side + GAP), GAP + bands * band), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, lines in enumerate(wrapped):
        x, y = MARGIN + number % COLUMNS * (side + GAP), GAP + number // COLUMNS * band
        for row, (label, images) in enumerate(rows.items()):
            top = y + row * (side + GAP)
            sheet.paste(images[number], (x, top))
            if number % COLUMNS == 0:
                sheet.paste(_upright(label, font, side), (0, top))
        for line, text in enumerate(lines):
            draw.text((x, y + len(rows) * (side + GAP) - GAP // 2 + line * LINE), text, INK, font)
    return sheet


def _upright(label: str, font: Font, side: int) -> Image.Image:
    """A row's label, turned to be read upwards along its left edge."""
    strip = Image.new("RGB", (side, MARGIN), PAPER)
    ImageDraw.Draw(strip).text((side // 2, MARGIN // 2), label, INK, font, anchor="mm")
    return strip.rotate(90, expand=True)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder in the official format")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the two bundles and the sheet")
    parser.add_argument("--runs", type=int, default=TIMED_RUNS, help="timed runs of each policy, after one warm-up")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    arguments = parser.parse_args()
    paths = ensure_bundles(arguments.out, checkpoint=arguments.checkpoint)
    pipes = {policy: Pipeline.load(path, threads=arguments.threads) for policy, path in paths.items()}
    captions = held_out_captions(PROMPTS, SCENE_SEED)
    images = {policy: pipe(captions, seed=IMAGE_SEED).images for policy, pipe in pipes.items()}
    sheet = arguments.out / "sheet.png"
    compose({"dense": images["dense"], "pruned": images["fastvar"]}, captions).save(sheet, optimize=True)
    summary = summarize(measure(pipes, captions, arguments.runs))
    Console().print(scale_table(summary))
    facts = environment(pipes["fastvar"].manifest)
    print(f"{facts['cpu']}, {facts['cpu_cores']} cores, {facts['backend']}, {facts['precision']}, batch 1")
    print(
        f"pruned is {summary['speedup_scales']:.2f} times as fast over the scales, "
        f"{summary['speedup_total']:.2f} times over the whole image"
    )
    print(f"wrote {sheet}")


if __name__ == "__main__":
    exit_on_user_error(main)
