"""Images of a call, each with its own subject, seed and settings, and how they are put together into passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engines.bundle.manifest import Manifest
from ..editing.edits import Editing
from .inputs import ConditioningInputs, ImageInput, Subject
from .params import SamplingParams, params_of_each, seeds_of_each
from .settings import SamplingSettings, chosen_settings, recorded


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


def asked_of(
    manifest: Manifest,
    reader: ConditioningInputs,
    subjects: Sequence[Subject],
    params: SamplingParams | Sequence[SamplingParams] | None,
    changes: dict[str, Any],
) -> list[Asked]:
    """The subjects of a call with what is said of them: once for all, or in lists with an entry for each.

    Raises:
        InputError, BundleError: as a call of the pipeline.
    """
    seeds = changes.get("seed")
    if isinstance(seeds, list | tuple) and len(seeds) != len(subjects):
        changes = {**changes, "seed": None}  # one for each image
    else:
        seeds = None
    each = params_of_each(params, changes, len(subjects))
    together = not isinstance(params, list | tuple)  # one way of drawing for all of them
    settings = [
        chosen_settings(manifest, steered=reader.steered(subjects if together else [subject]), **own.settings)
        for subject, own in zip(subjects, each, strict=True)
    ]
    given = reader.inputs(subjects, [own.negative_prompt for own in each], settings)
    parts = zip(subjects, given, each, settings, seeds_of_each(each, seeds), strict=True)
    return [Asked(*part) for part in parts]


def requests_of(manifest: Manifest, asked: Sequence[Asked], edits: Sequence[Editing] = ()) -> list[ImageRequest]:
    """The images of a call, in order. edits: one for each subject, or one for all."""
    requests: list[ImageRequest] = []
    for place, one in enumerate(asked):
        edit = edits[place % len(edits)] if edits else None
        record = recorded(manifest, one.settings, one.params.negative_prompt)
        for seed in one.seeds:
            own = (one.subject, one.given, seed, one.settings, record, edit)
            requests.append(ImageRequest(len(requests), *own))
    return requests


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
