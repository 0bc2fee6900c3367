"""What the nodes do, without ComfyUI: bundles by name, tensors to images and back, drawing that can be interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvar import Pipeline
from fastvar.errors import FastvarError, InputError
from fastvar.runtime.output import ScaleEvent
from fastvar.runtime.requests.inputs import draws_labels

MANIFEST = "manifest.json"
MOST_LOADED = 2
BUNDLES_OWN = -1.0  # a number that stands for the bundle's own setting
Preview = Callable[[int, int, Image.Image], None]  # scales drawn, of how many, what is known of the image
Interrupt = Callable[[], None]  # raises where the user has had enough


def bundles(folders: Sequence[str]) -> dict[str, Path]:
    """Bundles that lie in these folders, by name."""
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
            found.setdefault(manifest.parent.name, manifest.parent)
    return found


def bundle_named(name: str, folders: Sequence[str]) -> Path:
    """The folder of a bundle.

    Raises:
        InputError: there is none of that name.
    """
    known = bundles(folders)
    if name not in known:
        raise InputError(
            f"no bundle is named {name!r}",
            expected=", ".join(known) or f"a folder made by `fastvar build` in {folders[0] if folders else 'models'}",
            fix="build one there, and reload the page",
        )
    return known[name]


@lru_cache(maxsize=MOST_LOADED)
def loaded(path: Path, changed_ns: int, threads: int, memory: str) -> Pipeline:
    """A pipeline, kept until others are used; `changed_ns`: when its manifest was written."""
    return Pipeline.load(path, threads=threads or None, memory_budget=memory or None)


def load(name: str, folders: Sequence[str], threads: int = 0, memory: str = "") -> Pipeline:
    """The pipeline of a bundle.

    Args:
        threads: 0 for the library's choice.
        memory: "15GiB" say; empty for no budget.

    Raises:
        FastvarError: it cannot be loaded.
    """
    path = bundle_named(name, folders)
    return loaded(path, (path / MANIFEST).stat().st_mtime_ns, threads, memory.strip())


def settings(seed: int, guidance: float, tau: float, top_p: float) -> dict[str, Any]:
    """Settings as the pipeline takes them; a negative number is the bundle's own."""
    chosen = {"guidance_scale": guidance, "tau": tau, "top_p": top_p}
    return {"seed": seed} | {name: value for name, value in chosen.items() if value >= 0}


def draw(
    pipe: Pipeline,
    prompt: str,
    count: int,
    chosen: dict[str, Any],
    negative: str,
    preview: Preview,
    interrupt: Interrupt,
    image: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    **editing: Any,
) -> np.ndarray:
    """Images [B, H, W, 3] of floats from 0 to 1.

    Args:
        prompt: a text; or a class by number or name, where the bundle draws classes.
        count: images; their seeds count up.
        chosen: settings by name.
        image: [B, h, w, 3] of floats, each enlarged, or redrawn where `mask` [B or 1, h, w] is 1.
        preview: called at every scale of every image.
        interrupt: called at every scale; what it raises ends the drawing.

    Raises:
        FastvarError: what is asked for cannot be drawn.
    """
    subject = {"class_labels" if draws_labels(pipe.manifest) else "prompt": prompt}
    params = {**chosen, "num_images": count, **({"negative_prompt": negative} if negative.strip() else {})}
    read = pipe.requests
    if image is None:
        asked = read.generation(**subject, **params)
    else:
        asked = []
        for place, one in enumerate(image):
            own = {**params, "seed": params["seed"] + place * count}
            if mask is None:
                asked += read.upscaling(one, **subject, **own, **editing)
            else:
                asked += read.inpainting(one, _mask(mask, place), **subject, **own, **editing)
    steps = len(pipe.manifest.plan.steps)
    done = dict.fromkeys(range(len(asked)), 0)

    def told(event: ScaleEvent) -> None:
        interrupt()
        done[event.image] += 1
        preview(sum(done.values()), steps * len(asked), event.preview())

    output = pipe.draw(asked, told)
    return np.stack([np.asarray(drawn, np.float32) / 255 for drawn in output.images])


def _mask(mask: np.ndarray, place: int) -> np.ndarray:
    """The mask of an image: its own, or the only one. Above half is redrawn."""
    return np.asarray(mask[place if len(mask) > 1 else 0] > 0.5)


def in_words(error: FastvarError) -> ValueError:
    """What ComfyUI shows of an error."""
    return ValueError(str(error))
