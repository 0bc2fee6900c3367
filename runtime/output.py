"""What a generation reports: one event per scale, timings per image. Nouns only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.schedule import Size

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ScaleTiming:
    """One executed scale: tokens and kept tokens per guidance row, wall milliseconds."""

    index: int
    size: Size
    tokens: int
    kept: int
    ms: float


@dataclass(frozen=True)
class ScaleEvent(ScaleTiming):
    """A scale that has run. `preview()` draws what was known of the image then, at whatever time it is called."""

    preview: Callable[[], Image] = field(repr=False, default=lambda: _no_preview())


@dataclass(frozen=True)
class ImageTimings:
    """Wall milliseconds of one image. `text_ms` covers text encoder, condition and text keys."""

    text_ms: float
    scales: tuple[ScaleTiming, ...]
    decode_ms: float

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


@dataclass(frozen=True)
class Output:
    """Images in order: all images of the first prompt, then of the next."""

    images: list[Image]
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    timings: list[ImageTimings]
    draws: str = "prompt"  # what `prompts` are: prompts, or class labels


def _no_preview() -> Image:
    raise RuntimeError("this event carries no preview")
