"""What a generation reports: one event per scale, timings per image. Nouns only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.schedule import Size
from ..core.version import __version__

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ScaleTiming:
    """One executed scale: tokens and kept tokens per guidance row; wall milliseconds, of all `images` of the pass."""

    index: int
    size: Size
    tokens: int
    kept: int
    ms: float
    images: int = 1


@dataclass(frozen=True)
class ScaleEvent(ScaleTiming):
    """A scale of an image that has run. `image` is the image's index in the call.

    `preview()` draws what was known of it then, at whatever time it is called.
    """

    preview: Callable[[], Image] = field(repr=False, default=lambda: _no_preview())
    image: int = 0


@dataclass(frozen=True)
class ImageTimings:
    """Wall milliseconds of one image, or of all `images` of its pass: of `text_ms`, which covers text encoder,
    condition and text keys, and of the scales. `decode_ms` is the image's own.
    """

    text_ms: float
    scales: tuple[ScaleTiming, ...]
    decode_ms: float
    images: int = 1

    @property
    def scales_ms(self) -> float:
        return sum(scale.ms for scale in self.scales)

    @property
    def total_ms(self) -> float:
        return self.text_ms + self.scales_ms + self.decode_ms


@dataclass(frozen=True)
class GeneratedImage:
    """One image of a call, complete: its position in the call, what it was drawn from, and how long it took."""

    index: int
    image: Image
    prompt: str  # or the class label
    seed: int
    settings: dict[str, Any]
    timings: ImageTimings
    draws: str = "prompt"  # what `prompt` is: a prompt, or a class label

    def metadata(self, digest: str) -> dict[str, str]:
        """What an image file says of its origin; `digest` is the bundle's."""
        return {
            self.draws: self.prompt,
            "seed": str(self.seed),
            "settings": json.dumps(self.settings, sort_keys=True),
            "bundle": digest,
            "fastvar": __version__,
        }


@dataclass(frozen=True)
class Output:
    """Images in order: all images of the first prompt, then of the next.

    `settings` are those that all images share, `image_settings` all of each. `indices` are the images' places in the
    call.
    """

    images: list[Image]
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    timings: list[ImageTimings]
    draws: str = "prompt"  # what `prompts` are: prompts, or class labels
    image_settings: list[dict[str, Any]] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, results: Sequence[GeneratedImage], draws: str) -> Output:
        """Images of a call, in the order of their indices."""
        results = sorted(results, key=lambda result: result.index)
        each = [result.settings for result in results]
        first = each[0] if each else {}
        return cls(
            images=[result.image for result in results],
            prompts=[result.prompt for result in results],
            seeds=[result.seed for result in results],
            settings={name: value for name, value in first.items() if all(own.get(name) == value for own in each)},
            timings=[result.timings for result in results],
            draws=draws,
            image_settings=each,
            indices=[result.index for result in results],
        )

    def as_array(self) -> Output:
        """The same with `images` as one array [N, H, W, 3] of float32 from 0 to 1, as diffusers' "np"."""
        array = np.stack([np.asarray(image, np.float32) / 255 for image in self.images])
        return replace(self, images=array)  # type: ignore[arg-type]  # who asks for arrays knows


def _no_preview() -> Image:
    raise RuntimeError("this event carries no preview")
