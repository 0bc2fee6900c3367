"""Images of a call, each with its own subject, seed and settings, and how they are put together into passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .editing.edits import Editing
from .inputs import ImageInput, Subject
from .params import SamplingParams
from .settings import SamplingSettings


@dataclass(frozen=True)
class ImageRequest:
    """One image, checked: `record` is what the output tells of its settings, `index` its place in the call."""

    index: int
    subject: Subject
    given: ImageInput
    seed: int
    settings: SamplingSettings
    record: dict[str, Any] = field(default_factory=dict)
    edit: Editing | None = None


@dataclass(frozen=True)
class Asked:
    """One subject, checked: what was asked for, what that comes to with this bundle, and the seeds of its images."""

    subject: Subject
    given: ImageInput
    params: SamplingParams
    settings: SamplingSettings
    seeds: list[int]


def passes(images: Sequence[ImageRequest], sizes: Callable[[int], Sequence[int]]) -> list[list[ImageRequest]]:
    """Images put together, as many as a pass may hold; the rest goes into smaller ones.

    sizes: guidance rows of an image -> how many images a pass may draw, in rising order, one among them. Images with
    guidance and images without never share a pass. Those of a pass keep their order, and so do passes by their first.
    """
    found: list[list[ImageRequest]] = []
    for rows in dict.fromkeys(image.settings.rows for image in images):
        left = [image for image in images if image.settings.rows == rows]
        while left:
            count = max(size for size in sizes(rows) if size <= len(left))
            found.append(left[:count])
            left = left[count:]
    return sorted(found, key=lambda made: made[0].index)
