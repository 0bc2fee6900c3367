"""Draws items with one pipeline, and writes each image as soon as it is complete. Used by processes here and on Ray."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..core.platform import usable_cores
from ..engines.registry import runs_on_host
from ..errors import BundleError, FastvarError, ImagesFailed, InputError
from ..runtime.images.formats import format_named
from ..runtime.output import GeneratedImage
from ..runtime.pipeline import Pipeline
from ..runtime.requests.params import SamplingParams
from ..runtime.requests.passes import ImageRequest
from .folder import MOST_ATTEMPTS, BulkFolder
from .items import Item

DRAWN, THERE, FAILED = "drawn", "there", "failed"
Report = Callable[[str, str], object]  # key, what became of it


class Drawer:
    """A pipeline, and the folder that its images go to.

    Args:
        bundle: a folder; its digest must be `digest`, on whatever machine this is.
        load_options: arguments of `Pipeline.load`.

    Raises:
        BundleError: another bundle, or one that cannot be opened.
    """

    def __init__(
        self,
        bundle: Path,
        digest: str,
        folder: Path,
        image_format: str,
        quality: int | None = None,
        load_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._format, self._quality = format_named(image_format), quality
        self._folder = BulkFolder.of(folder, image_format)
        self._pipe = Pipeline.load(bundle, **dict(load_options or {}))
        self._encoders = ThreadPoolExecutor(usable_cores(), "encodes")
        self._saving: list[tuple[Item, Future[None]]] = []
        if self._pipe.bundle.digest != digest:
            raise BundleError(
                f"{bundle} is another bundle here: its digest is {self._pipe.bundle.digest[:16]}",
                expected=f"{digest[:16]}, that of the one that was asked for",
                fix="copy the same bundle to every machine, or use a shared folder",
            )

    @property
    def most(self) -> int:
        """Images of the largest pass."""
        return max(size for sizes in self._pipe.batch_sizes.values() for size in sizes)

    def draw(self, items: Sequence[Item], report: Report) -> None:
        """Draw what is not there yet. Images that a process died of are drawn alone, so that others need not suffer.

        Raises:
            InputError: the folder cannot be written.
        """
        try:
            self._draw_all(items, report)
        except OSError as error:
            self._saving = []
            self._folder.ended([item.key for item in items])  # it is not they that are to blame
            problem = f"cannot write into {self._folder.path}: {error.strerror}"
            raise InputError(problem, fix="make room there, and run it again: what is drawn is kept") from error

    def _draw_all(self, items: Sequence[Item], report: Report) -> None:
        together: list[tuple[Item, ImageRequest]] = []
        for item in items:
            if self._folder.has(item.key):
                report(item.key, THERE)
                continue
            attempts = self._folder.attempts(item.key)
            if attempts >= MOST_ATTEMPTS:
                problem = f"{attempts} processes died of it, by a signal or for want of memory"
                fix = "leave the row away; or try it again with --retry-errors"
                self._fail(item, InputError(problem, fix=fix), report)
                continue
            try:
                request = self._request(item)
            except FastvarError as error:
                self._fail(item, error, report)
                continue
            if attempts:
                self._draw([(item, request)], report)
            else:
                together.append((item, request))
        for first in range(0, len(together), self.most):
            self._draw(together[first : first + self.most], report)
        self._saved(report)

    def _draw(self, given: Sequence[tuple[Item, ImageRequest]], report: Report) -> None:
        """Draw what fits into a pass. Images are encoded beside the next one, where no engine wants the cores."""
        self._folder.begun([item.key for item, _ in given])
        failures: dict[int, FastvarError] = {}
        drawn: list[GeneratedImage] = []
        try:
            self._pipe.draw([request for _, request in given], callback_on_image_end=drawn.append)
        except ImagesFailed as error:
            failures |= error.failed
        except FastvarError as error:
            failures |= dict.fromkeys(range(len(given)), error)
        for place, failure in failures.items():
            self._fail(given[place][0], failure, report)
        self._saved(report)  # those of the pass before
        finished = [(given[image.index][0], image) for image in drawn]
        self._saving = [(item, self._encoders.submit(self._save, item, image)) for item, image in finished]
        if runs_on_host(self._pipe.manifest):
            self._saved(report)

    def _save(self, item: Item, drawn: GeneratedImage) -> None:
        # Of the image alone: the same whoever draws it, in whatever pass.
        origin = {**drawn.metadata(self._pipe.bundle.digest), "key": item.key}
        self._folder.save(item.key, self._format.encode(drawn.image, origin, self._quality))

    def _saved(self, report: Report) -> None:
        """Wait for images that are being encoded, and tell of them."""
        saving, self._saving = self._saving, []
        for item, encoded in saving:
            try:
                encoded.result()
            except FastvarError as error:
                self._fail(item, error, report)
            else:
                report(item.key, DRAWN)

    def _request(self, item: Item) -> ImageRequest:
        """What the pipeline is asked for.

        Raises:
            InputError, BundleError: it cannot draw that.
        """
        read, what = self._pipe.requests, item.subject
        subject: dict[str, Any] = {"prompt": what} if item.kind == "prompt" else {"class_labels": what}
        params, editing = SamplingParams(seed=item.seed, **item.settings), item.editing or {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown words: thousands of lines would say so
            if item.image is None:
                return read.generation(**subject, params=params)[0]
            if item.mask is None:
                return read.upscaling(item.image, **subject, params=params, **editing)[0]
            return read.inpainting(item.image, item.mask, **subject, params=params, **editing)[0]

    def _fail(self, item: Item, error: FastvarError, report: Report) -> None:
        self._folder.fail(item.key, item.row, item.name, error.parts)
        self._folder.ended([item.key])  # the process lives
        report(item.key, FAILED)
