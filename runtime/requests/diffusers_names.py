"""Arguments by the names that diffusers' pipelines have, for those who come from there."""

from __future__ import annotations

from typing import Any

from ...core.arguments import shown
from ...core.schedule import Size
from ...errors import InputError
from .params import rename

SAME = {"num_images_per_prompt": "num_images", "generator": "seed"}
OUTPUT_TYPES = ("pil", "np")


def translated(changes: dict[str, Any], size: Size) -> str:
    """Put our names in place of theirs, in `changes`; gives the output type, "pil" or "np".

    `generator` may be an int or whatever has `initial_seed()`; `width` and `height` must be the bundle's.

    Raises:
        InputError: one that cannot be understood, another size, or a setting that is given by two names.
    """
    if "generator" in changes:
        changes["generator"] = _seed(changes["generator"])
    for theirs, ours in SAME.items():
        if changes.get(theirs) is not None:
            rename(changes, theirs, ours)
        changes.pop(theirs, None)
    own = dict(zip(("height", "width"), size, strict=True))
    for name, pixels in own.items():
        if (asked := changes.pop(name, None)) not in (None, pixels):
            raise InputError(
                f"{name} {shown(asked)}, but the bundle draws {size[1]}x{size[0]}",
                expected=f"{pixels}: its schedule and memory are static",
                fix=f"leave it away, or build a bundle with --size of {name} {shown(asked)}",
            )
    found = changes.pop("output_type", None) or "pil"
    if found not in OUTPUT_TYPES:
        raise InputError(f"output_type {shown(found)} not understood", expected=" or ".join(map(repr, OUTPUT_TYPES)))
    return str(found)


def _seed(generator: Any) -> Any:
    """A list may hold one for each image."""
    if isinstance(generator, list | tuple):
        return [_seed(one) for one in generator]
    drawn = getattr(generator, "initial_seed", None)
    return drawn() if callable(drawn) else generator
