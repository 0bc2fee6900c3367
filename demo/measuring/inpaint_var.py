"""Class-conditional editing shown: the shape of a scene is masked and redrawn as another class, and as none.

`python -m demo.measuring.inpaint_var` takes the model that `python -m demo.training.var` trains, and writes
docs/inpaint_var.png.
"""

import argparse
from pathlib import Path

from PIL import Image

import fastvar
from demo.bands import compose
from demo.bundles import ROOT, exit_on_user_error
from demo.draw_scene import render
from demo.measuring.background import background_of
from demo.measuring.inpaint import Change, framed
from demo.measuring.var_tradeoff import SAMPLING, SIZE
from demo.scenes import Scene, Shape
from demo.training.var.codec import CLASSES
from demo.training.var.stages import OUT
from fastvar import UNCONDITIONAL, Pipeline
from fastvar.errors import CheckpointError

SHEET = ROOT.parent / "docs" / "inpaint_var.png"
SEED = 2


def change(background: str, before: str, cell: str, after: str) -> Change:
    """A large plain shape on a background, and the class that it becomes."""
    (color, kind), (new_color, new_kind) = before.split(), after.split()
    scene = Scene(background, (Shape(kind, color, "large", "plain", cell),), "alone")
    return Change(scene, 0, new_kind, new_color, "plain")


CHANGES = (
    change("white", "red circle", "centre", "blue square"),
    change("black", "yellow square", "left", "green circle"),
    change("gray", "cyan triangle", "bottom right", "purple square"),
)


def label_of(shown: Change) -> int:
    """The class that a change makes of its shape."""
    return CLASSES.index(f"{shown.color} {shown.kind}")


def rows_of(pipe: Pipeline) -> dict[str, list[Image.Image]]:
    """What the sheet shows, row by row."""
    rows: dict[str, list[Image.Image]] = {"image and mask": [], "another class": [], "as decoded": [], "no class": []}
    for shown in CHANGES:
        image, mask = Image.fromarray(render(shown.scene)), shown.mask
        rows["image and mask"].append(framed(image, mask))
        for name, label, composite in (
            ("another class", label_of(shown), True),
            ("as decoded", label_of(shown), False),
            ("no class", UNCONDITIONAL, True),
        ):
            drawn = pipe.inpaint(image, mask, class_labels=label, seed=SEED, composite=composite)
            rows[name].append(drawn.images[0])
        found = background_of(pipe, image, mask, {"class_labels": label_of(shown)})
        print(f"{CLASSES[label_of(shown)]}: around the mask, as decoded, {found}")
    return rows


def build(checkpoint: Path) -> Path:
    """The checkpoint's bundle under the `fastvar` policy, with the image encoder."""
    if not (checkpoint / "transformer.pth").is_file():
        raise CheckpointError(
            f"no transformer in {checkpoint}",
            expected="transformer.pth",
            fix="train it with `python -m demo.training.var`",
        )
    out = checkpoint / "bundles" / "editing"
    out.parent.mkdir(parents=True, exist_ok=True)
    fastvar.build(checkpoint, size=SIZE, policy="fastvar", with_encoder=True, sampling=SAMPLING, out=out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=OUT, help="folder that `python -m demo.training.var` writes")
    parser.add_argument("--threads", type=int, help="CPU threads; give 1 on a machine that is busy otherwise")
    parser.add_argument("--sheet", type=Path, default=SHEET, help="where the images go")
    arguments = parser.parse_args()
    with Pipeline.load(build(arguments.checkpoint), threads=arguments.threads) as pipe:
        rows = rows_of(pipe)
    captions = [f"{CLASSES[label_of(shown)]} (seed {SEED})" for shown in CHANGES]
    compose(rows, captions).save(arguments.sheet, optimize=True)
    print(f"wrote {arguments.sheet}")


if __name__ == "__main__":
    exit_on_user_error(main)
