"""A request's images on their way: waiting, being drawn, told of. The drawing thread tells, the answer reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.output import GeneratedImage, ScaleEvent
from ..runtime.requests.passes import ImageRequest


@dataclass(frozen=True)
class Moved:
    """So many requests are ahead now; none when its own drawing begins."""

    ahead: int


@dataclass(frozen=True)
class Scale:
    """A scale of an image has been drawn. place: the image's, among those of the request.

    `encoded` is its preview as the request wants it, where the thread that draws has made it.
    """

    place: int
    event: ScaleEvent
    encoded: Any = None


@dataclass(frozen=True)
class Finished:
    """An image is complete, and encoded as its request wants it."""

    place: int
    image: GeneratedImage
    encoded: Any = None


@dataclass(frozen=True)
class Failed:
    """Nothing more will come."""

    error: Exception


News = Moved | Scale | Finished | Failed


@dataclass(eq=False)
class Job:
    """The images of one request.

    `watched` are the scales, by index, whose previews are wanted. Everything but `news` is guarded by the lock of the
    model that draws it; `tell` may be called from any thread.
    """

    requests: Sequence[ImageRequest]
    watched: frozenset[int] = frozenset()
    streams: bool = True  # whether anybody is told of its place in the queue
    encode: Callable[[GeneratedImage], Any] = lambda image: None  # called in a thread of its own
    encode_preview: Callable[[ScaleEvent], Any] = lambda event: None
    arrived: float = field(default_factory=time.monotonic)
    begun: float | None = None  # when its first image was
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.news: asyncio.Queue[News] = asyncio.Queue()
        self.left = list(range(len(self.requests)))  # places of images that no pass has taken yet
        self.unfinished = len(self.requests)
        self._loop = asyncio.get_running_loop()

    @property
    def queue_ms(self) -> float:
        """How long it waited."""
        return ((self.begun or time.monotonic()) - self.arrived) * 1e3

    def tell(self, news: News) -> None:
        try:
            self._loop.call_soon_threadsafe(self.news.put_nowait, news)
        except RuntimeError:  # the loop is closed: nobody is left who would hear
            self.cancelled = True
