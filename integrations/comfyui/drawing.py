"""What the nodes draw: ComfyUI's arrays to requests of a pipeline, and its images back. Knows no ComfyUI."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvar.errors import InputError, UnknownWordsWarning

from .bundles import draws_classes

if TYPE_CHECKING:
    from PIL import Image

    from fastvar import Pipeline
    from fastvar.runtime.output import ScaleEvent
    from fastvar.runtime.requests.passes import ImageRequest

BUNDLES_OWN = -1.0  # a number that stands for the bundle's own setting
FITS = ("crop", "exact")
Preview = Callable[[int, int, "Image.Image"], None]  # scales drawn, of how many, what is known of the image
Interrupt = Callable[[], None]  # raises where the user has had enough
Told = Callable[[str], None]  # a line for the user


def settings(seed: int, guidance: float, tau: float, top_p: float) -> dict[str, Any]:
    """Settings as the pipeline takes them: those that are not the bundle's own."""
    chosen = {"guidance_scale": guidance, "tau": tau, "top_p": top_p}
    return {"seed": seed} | {name: value for name, value in chosen.items() if value != BUNDLES_OWN}


def draw(
    pipe: Pipeline,
    prompt: str,
    count: int,
    chosen: dict[str, Any],
    negative: str,
    preview: Preview,
    interrupt: Interrupt,
    warned: Told,
    told: Told,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    **editing: Any,
) -> np.ndarray:
    """Images [B, H, W, 3] of float32 from 0 to 1.

    Args:
        prompt: a text; or a class by number or name, where the bundle draws classes.
        count: images; their seeds count up.
        chosen: settings by name.
        preview: called at every scale of every image.
        interrupt: called at every scale; what it raises ends the drawing.
        warned: called with what of the prompts is not understood, a line each.
        told: called with seeds and settings of what is drawn, the bundle's own among them, before it is.
        image: [B, h, w, 3] of floats, each enlarged, or redrawn where its mask is 1.
        mask: [B or 1, h, w] of floats; some nodes give [h, w].

    Raises:
        FastvarError: what is asked for cannot be drawn.
    """
    masks = None if mask is None or image is None else _of_each(mask, len(image))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asked = _asked(pipe, prompt, count, chosen, negative, image, masks, editing)
    for line in dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UnknownWordsWarning)):
        warned(line)
    told(summary(asked))
    total = len(pipe.manifest.plan.steps) * len(asked)
    done = 0

    def scale_ended(event: ScaleEvent) -> None:
        nonlocal done
        interrupt()
        done += 1
        preview(done, total, event.preview())

    output = pipe.draw(asked, scale_ended)
    return np.stack([np.asarray(drawn, np.float32) / 255 for drawn in output.images])


def summary(asked: Sequence[ImageRequest]) -> str:
    """Seeds and settings of images, in a line."""
    first, last, settings = asked[0].seed, asked[-1].seed, asked[0].record
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    named = {"guidance": "guidance_scale", "tau": "tau", "top_p": "top_p"}  # as the nodes call them
    return ", ".join((seeds, *(f"{own} {settings[name]:g}" for own, name in named.items() if name in settings)))


def _asked(
    pipe: Pipeline,
    prompt: str,
    count: int,
    chosen: dict[str, Any],
    negative: str,
    images: np.ndarray | None,
    masks: Sequence[np.ndarray] | None,
    editing: dict[str, Any],
) -> list[ImageRequest]:
    """What is asked for, checked by the pipeline: the images of a generation, or one for each image that is given."""
    given = {
        "class_labels" if draws_classes(pipe) else "prompt": prompt,
        "num_images": count,
        **({"negative_prompt": negative} if negative.strip() else {}),
    }
    read = pipe.requests
    if images is None:
        return list(read.generation(**given, **chosen))
    asked: list[ImageRequest] = []
    for place, image in enumerate(images):
        own = {**given, **chosen, "seed": chosen["seed"] + place * count, **editing}
        asked += read.upscaling(image, **own) if masks is None else read.inpainting(image, masks[place], **own)
    return asked


def _of_each(mask: np.ndarray, images: int) -> list[np.ndarray]:
    """The mask of each image as booleans, its own or the only one: above half is redrawn.

    Raises:
        InputError: other numbers of masks, or nothing is masked.
    """
    mask = mask.reshape(-1, *mask.shape[-2:])
    if len(mask) not in (1, images):
        raise InputError(f"{len(mask)} masks for {images} images", expected="one for all, or one for each")
    found = [one > 0.5 for one in mask]
    if empty := [place for place, one in enumerate(found, start=1) if not one.any()]:
        which = "the mask" if len(found) == 1 else f"mask {_listed(empty)} of {len(found)}"
        raise InputError(
            f"{which} is empty",
            expected="1 where the image is to be drawn anew",
            fix="paint one: right-click the image's node, Open in MaskEditor",
        )
    return found * images if len(found) == 1 else found


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
