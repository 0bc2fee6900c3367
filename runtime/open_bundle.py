"""A bundle that is open for drawing: what can be said of it, what it takes, and its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from ..core.arguments import byte_count, flag, number, seconds, whole
from ..core.schedule import Size
from ..engines.base import Backend
from ..engines.bundle.bundle import Bundle
from ..errors import InputError
from .memory.fit import DeviceNeed
from .requests.params import MAX_IMAGES
from .requests.reading import RequestReader
from .requests.settings import chosen_settings
from .sampling import ImageSampler
from .session import Session
from .turns import Turns, closed

MAX_THREADS = 4096  # the largest machines have so many
Own = TypeVar("Own", bound="OpenBundle")


class OpenBundle:
    """What `Pipeline` draws with. Ends with `close`, or as a context manager."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        offload_text_encoder: bool = False,
        cuda_graphs: bool = True,
        memory_budget: str | int | None = None,
        busy_timeout: float | None = None,
        batch: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        self._bundle: Bundle | None = bundle
        self.manifest = bundle.manifest
        self._turns = Turns(seconds("busy_timeout", busy_timeout))
        session = Session(
            bundle,
            threads=None if threads is None else whole("threads", threads, 1, MAX_THREADS),
            offload_text_encoder=flag("offload_text_encoder", offload_text_encoder),
            cuda_graphs=flag("cuda_graphs", cuda_graphs),
            memory_budget=None if memory_budget is None else byte_count("memory_budget", memory_budget),
            backend=backend,
            batch=None if batch is None else whole("batch", batch, 1, MAX_IMAGES),
        )
        self._sampler = ImageSampler(session, self._turns)
        self._reader = RequestReader(bundle)
        self._origin: tuple[Path, dict[str, Any]] | None = None  # path and arguments of `load`

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.manifest.plan.schedule.pixels

    @property
    def bundle(self) -> Bundle:
        """The bundle that is drawn from.

        Raises:
            InputError: the pipeline is closed; it holds no bundle any more.
        """
        if self._bundle is None:
            raise closed()
        return self._bundle

    @property
    def batch_sizes(self) -> dict[str, list[int]]:
        """How many images one pass may draw, in rising order, with guidance "on" and "off"; empty without engines."""
        return {name: self._session.batch_sizes(rows) for name, rows in (("on", 2), ("off", 1))}

    @property
    def memory_need(self) -> DeviceNeed:
        """Bytes of its weights, of its arena, and of the engines' library by estimate."""
        return self._session.need

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._sampler.is_closed

    def close(self, timeout: float | None = None) -> None:
        """Give back engines and memory; images and previews that were drawn stay. Closing again does nothing.

        Waits for the image that is being drawn and for calls in line, as any call does. Streams end: their readers get
        what was drawn, then an InputError, as does every later call.

        Raises:
            PipelineBusy: from within a callback, or others draw for longer than `timeout` seconds.
        """
        self._sampler.close(seconds("timeout", timeout))
        self._bundle = None  # it holds the weights' map, and engines as bytes

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def warm_up(self, images: int = 1, *, guidance_scale: float | None = None, timeout: float | None = None) -> None:
        """Load the engines of a pass now, not when it is first drawn: the first image takes as long as others.

        Args:
            images: of the pass: one of `batch_sizes`.
            guidance_scale: whether the pass has guidance; by default as the bundle draws.
            timeout: seconds to wait for others; `busy_timeout` by default.

        Raises:
            InputError: the bundle has no engines for so many images, or the pipeline is closed.
            PipelineBusy, BundleError: as a call.
        """
        scale = None if guidance_scale is None else number("guidance_scale", guidance_scale)
        settings = chosen_settings(self.manifest, guidance_scale=scale)
        sizes = self._session.batch_sizes(settings.rows)
        if whole("images", images, 1, MAX_IMAGES) not in sizes:
            raise InputError(f"a pass of {images} images", expected=f"one of {', '.join(map(str, sizes))}")
        self._sampler.prepare(settings.rows, images, seconds("timeout", timeout))

    @property
    def _session(self) -> Session:
        return self._sampler.session
