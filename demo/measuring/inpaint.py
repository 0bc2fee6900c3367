"""In-painting shown: one shape of a scene is masked and redrawn under another caption. Writes docs/inpaint.png."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from demo.bands import compose
from demo.bundles import OUT, ROOT, ensure_bundles, exit_on_user_error
from demo.draw_scene import BASE_SIDE, render
from demo.measuring.background import background_of
from demo.scenes import SIZES, Scene, Shape, caption
from fastvar import Pipeline

SHEET = ROOT.parent / "docs" / "inpaint.png"
ROOM = 14  # pixels around the shape that the mask takes too
FRAME = (255, 0, 255)
SEED = 2


@dataclass(frozen=True)
class Change:
    """A scene, and what the shape at `position` becomes; its cell stays."""

    scene: Scene
    position: int
    kind: str
    color: str
    pattern: str

    @property
    def wanted(self) -> Scene:
        shapes = list(self.scene.shapes)
        old = shapes[self.position]
        shapes[self.position] = Shape(self.kind, self.color, old.size, self.pattern, old.cell)
        return Scene(self.scene.background, tuple(shapes), self.scene.relation)

    @property
    def mask(self) -> Image.Image:
        """White on the shape and a little around it."""
        shape = self.scene.shapes[self.position]
        x, y = (place * BASE_SIDE for place in shape.centre)
        reach = SIZES[shape.size] + ROOM
        mask = Image.new("L", (BASE_SIDE, BASE_SIDE))
        ImageDraw.Draw(mask).rectangle((x - reach, y - reach, x + reach, y + reach), fill=255)
        return mask


CHANGES = (
    Change(
        Scene(
            "white",
            (Shape("circle", "red", "large", "plain", "left"), Shape("square", "blue", "large", "striped", "right")),
            "left of",
        ),
        1,
        "circle",
        "green",
        "checked",
    ),
    Change(
        Scene(
            "black",
            (
                Shape("triangle", "yellow", "large", "plain", "top"),
                Shape("circle", "cyan", "large", "checked", "bottom"),
            ),
            "above",
        ),
        1,
        "square",
        "purple",
        "plain",
    ),
    Change(
        Scene("gray", (Shape("square", "green", "large", "plain", "centre"),), "alone"), 0, "circle", "red", "striped"
    ),
)


def framed(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with the mask's outline."""
    shown, box = image.copy(), mask.getbbox()
    assert box is not None
    ImageDraw.Draw(shown).rectangle(box, outline=FRAME, width=3)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundles", type=Path, default=OUT, help="folder of the two bundles; built where missing")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="where the images go")
    arguments = parser.parse_args()
    pipe = Pipeline.load(ensure_bundles(arguments.bundles)["fastvar"], threads=arguments.threads)
    rng = np.random.default_rng(SEED)
    captions = [caption(change.wanted, rng) for change in CHANGES]
    rows: dict[str, list[Image.Image]] = {"image and mask": [], "redrawn": [], "as decoded": []}
    for change, text in zip(CHANGES, captions, strict=True):
        image = Image.fromarray(render(change.scene))
        rows["image and mask"].append(framed(image, change.mask))
        for label, composite in (("redrawn", True), ("as decoded", False)):
            rows[label].append(pipe.inpaint(image, change.mask, text, seed=SEED, composite=composite).images[0])
        print(f"{text}: around the mask, as decoded, {background_of(pipe, image, change.mask, {'prompt': text})}")
    compose(rows, captions).save(arguments.sheet, optimize=True)
    print(f"wrote {arguments.sheet}")


if __name__ == "__main__":
    exit_on_user_error(main)
