"""A bundle that is served: a queue in order of arrival, and threads that draw it in passes of several requests."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.platform import usable_cores
from ..engines.registry import runs_on_host
from ..errors import ImagesFailed
from ..runtime.output import GeneratedImage, ScaleEvent
from ..runtime.pipeline import Pipeline
from ..runtime.preview import Preview
from ..runtime.requests.passes import passes
from .jobs import Failed, Finished, Job, Moved, Scale
from .lanes import Lane, open_lanes
from .metrics import Metrics
from .options import ServeOptions
from .wire import answers

REMEMBERED = 16  # images whose time tells how long the next ones take
FIRST_GUESS = 2.0  # seconds an image, before any was drawn
Unit = tuple[Job, int]  # one image: whose, and which of its


class Abandoned(Exception):  # noqa: N818  no error: nobody wants the pass any more
    """Everybody whom the pass was drawn for has gone."""


class ServedModel:
    """One bundle. `load` makes its pipelines, in the thread that draws with the first: a GPU's first user owns it."""

    def __init__(self, name: str, load: Callable[[], Sequence[Lane]], options: ServeOptions, metrics: Metrics) -> None:
        self.name, self._load, self._options, self._metrics = name, load, options, metrics
        self.pipe: Pipeline | None = None
        self.failure: Exception | None = None  # why it could not be loaded
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._lanes: Sequence[Lane] = ()
        self._is_closed = self._is_ending = self._is_over = False
        self._is_on_host = True
        self._recent: deque[float] = deque(maxlen=REMEMBERED)  # seconds until the next image
        self._thread = threading.Thread(target=self._run, name=f"draws {name}", daemon=True)
        self._loaded: Callable[[], object] = lambda: None
        self._encoders = ThreadPoolExecutor(usable_cores(), f"encodes {name}")

    @classmethod
    def of_bundle(
        cls, name: str, path: Path, options: ServeOptions, metrics: Metrics, **load_options: Any
    ) -> ServedModel:
        """A model whose bundle lies in a folder; `load_options` as for `Pipeline.load`."""
        return cls(name, lambda: open_lanes(path, options.instances, **load_options), options, metrics)

    def start(self, loaded: Callable[[], object]) -> None:
        """Load and draw in a thread of its own; `loaded` is called there when that was done, or has failed."""
        self._loaded = loaded
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return self.pipe is not None

    @property
    def instances(self) -> int:
        """How many passes may be drawn side by side."""
        return max(1, len(self._lanes) - 1)

    @property
    def has_died(self) -> bool:
        """Whether it draws no longer, though nobody asked it to end."""
        return not (self._thread.is_alive() or self._is_ending)

    # What answers do, in the thread of the event loop

    def check_room(self) -> None:
        """Before a request is read any further.

        Raises:
            ApiError: the bundle is not loaded, the server ends, or too many wait.
        """
        if self.pipe is None:
            raise answers.loading(self.name)
        with self._lock:
            self._check_room()

    def submit(self, job: Job) -> None:
        """Put a job in line.

        Raises:
            ApiError: as `check_room`.
        """
        with self._lock:
            self._check_room()
            self._waiting.append(job)
            ahead = len({*self._drawing, *self._waiting} - {job})
            self._count()
            self._lock.notify_all()
        self._tell_place(job, ahead)

    def _check_room(self) -> None:
        if self._is_closed:
            raise answers.shutting_down()
        if self._length >= self._options.queue:
            raise answers.queue_full(self._length, self._seconds_an_image * self._images_ahead)

    @property
    def _length(self) -> int:
        """Requests that wait. One whose images take several passes stays in the queue, but waits no longer."""
        return sum(job.begun is None for job in self._waiting)

    @property
    def _drawing(self) -> set[Job]:
        return {job for lane in self._lanes for job in lane.drawing}

    @property
    def _images_ahead(self) -> int:
        """Images of all who are there: who is refused now would be among the next ones then, and asks no sooner."""
        return sum(job.unfinished for job in {*self._drawing, *self._waiting})

    @property
    def _seconds_an_image(self) -> float:
        return sum(self._recent) / len(self._recent) if self._recent else FIRST_GUESS

    def cancel(self, job: Job) -> str:
        """Nobody waits for the job: it leaves the queue, or is drawn no further than the present scale.

        Gives the stage that it was in: "queued", "drawing", or none where all of it had been drawn.
        """
        with self._lock:
            if job.cancelled or not job.unfinished:
                return ""
            job.cancelled = True
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)
            self._tell_places()
            self._count()
            return "queued" if job.begun is None else "drawing"

    def refuse_waiting(self) -> None:
        """Nothing new is begun from now on; whoever waits is told."""
        with self._lock:
            self._is_closed = True
            for job in self._waiting:
                if job.begun is None:
                    job.cancelled = True
                    job.tell(Failed(answers.shutting_down()))
            self._waiting = deque(job for job in self._waiting if job.begun is not None)
            self._count()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is drawn and nobody waits."""
        return not (self._drawing or self._waiting)

    async def idle(self, seconds: float) -> bool:
        """Wait until nothing is drawn and nobody waits, or the time is over; gives whether that came."""
        end = time.monotonic() + seconds
        while not self.is_idle:
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(0.02)
        return True

    def abandon(self) -> None:
        """End what is being drawn, at the next scale; whoever waits for it is told."""
        with self._lock:
            self._is_closed = True
            for job in {*self._drawing, *self._waiting}:
                if not job.cancelled:
                    job.cancelled = True
                    job.tell(Failed(answers.shutting_down()))
            self._waiting.clear()

    def end(self) -> None:
        """Have the threads end, and give the pipelines back; waits for neither."""
        self.abandon()
        with self._lock:
            self._is_ending = self._is_over = True
            self._lock.notify_all()

    async def stop(self) -> None:
        """End the threads; gives the pipelines back."""
        self.end()
        await asyncio.to_thread(self._thread.join, self._options.patience)

    # What the drawing threads do

    def _run(self) -> None:
        try:
            self._lanes = self._load()
        except Exception as error:  # noqa: BLE001  raised where the server was started
            self.failure = error
            self._loaded()
            return
        with contextlib.ExitStack() as stack:
            for lane in self._lanes:
                stack.enter_context(lane.pipe)
            self._is_on_host = runs_on_host(self._lanes[0].pipe.manifest)
            self.pipe = self._lanes[0].pipe
            self._metrics.ready.labels(self.name).set(1)
            self._loaded()
            others = [threading.Thread(target=self._draw_passes, args=(lane,)) for lane in self._lanes[1:]]
            try:
                for thread in others:
                    thread.start()
                self._draw_passes(self._lanes[0])
            finally:  # whatever ends it, nobody waits for it any longer
                self.pipe = None
                self._metrics.ready.labels(self.name).set(0)
                self.abandon()
                for thread in others:
                    thread.join()
                self._encoders.shutdown()

    def _draw_passes(self, lane: Lane) -> None:
        """Until the end; where one of the threads fails, all of them end."""
        try:
            while units := self._next_pass(lane):
                self._draw(lane, units)
        finally:
            with self._lock:
                self._is_over = True
                self._lock.notify_all()

    def _next_pass(self, lane: Lane) -> list[Unit]:
        """Wait for images, and take as many as fit into a pass with the one that is first; none at the end."""
        with self._lock:
            while not self._is_over:
                if not self._waiting:
                    self._lock.wait()
                    continue
                together = self._together(lane.pipe)
                if not lane.may_begin(self._lanes, several=len(together) > 1):
                    self._lock.wait()
                    continue
                if (left := self._worth_waiting(lane.pipe, together[0])) > 0:
                    self._lock.wait(left)
                    continue
                self._begin(lane, together[0])
                return together[0]
        return []

    def _together(self, pipe: Pipeline) -> list[list[Unit]]:
        """All that waits, in passes."""
        units = [(job, place) for job in self._waiting for place in job.left]
        images = [replace(job.requests[place], index=index) for index, (job, place) in enumerate(units)]
        found = passes(images, lambda rows: self._sizes(pipe, rows))
        return [[units[image.index] for image in own] for own in found]

    @staticmethod
    def _sizes(pipe: Pipeline, rows: int) -> list[int]:
        return pipe.batch_sizes["on" if rows == 2 else "off"]

    def _worth_waiting(self, pipe: Pipeline, units: list[Unit]) -> float:
        """Seconds that the first request may still wait for others to share its pass."""
        job, place = units[0]
        most = self._sizes(pipe, job.requests[place].settings.rows)[-1]
        if len(units) == most or len(job.left) < len(job.requests):
            return 0.0
        return job.arrived + self._options.batch_wait_ms / 1e3 - time.monotonic()

    def _begin(self, lane: Lane, units: list[Unit]) -> None:
        now = time.monotonic()
        for job, place in units:
            job.left.remove(place)
            if job.begun is None:
                job.begun = now
                self._metrics.queue_seconds.labels(self.name).observe(now - job.arrived)
                self._tell_place(job, 0)
        lane.drawing = list(dict.fromkeys(job for job, _ in units))
        self._waiting = deque(job for job in self._waiting if job.left)
        self._tell_places()
        self._count(len(units))
        self._lock.notify_all()  # what is left may be another lane's

    def _tell_places(self) -> None:
        ahead = self._drawing
        for job in self._waiting:
            if job.begun is None:
                self._tell_place(job, len(ahead))
            ahead.add(job)

    @staticmethod
    def _tell_place(job: Job, ahead: int) -> None:
        if job.streams:  # nobody else is shown it
            job.tell(Moved(ahead))

    def _count(self, begun: int = 0) -> None:
        self._metrics.queue_length.labels(self.name).set(self._length)
        self._metrics.running.labels(self.name).inc(begun)

    def _draw(self, lane: Lane, units: list[Unit]) -> None:
        begun = time.monotonic()
        self._metrics.pass_images.labels(self.name).observe(len(units))
        requests = [job.requests[place] for job, place in units]
        failures: dict[int, Exception] = {}
        encoding: list[Future[None]] = []
        drawn: list[GeneratedImage] = []

        def encode(image: GeneratedImage) -> None:
            encoding.append(self._encoders.submit(self._tell_image, units, image))

        try:
            try:
                # On cores that draw, encoding beside the decoder would stop both: each operation waits for all threads.
                on_image = drawn.append if self._is_on_host else encode
                lane.pipe.draw(requests, lambda event: self._tell_scale(units, event), on_image)
            finally:
                for image in drawn:
                    if lane.is_whole:
                        encode(image)
                    else:
                        self._tell_image(units, image)
            if self._is_on_host:
                wait(encoding)
            spent = (time.monotonic() - begun) / len(units)
            self._recent.append(spent if lane.is_whole else spent / self.instances)
            self._metrics.image_seconds.labels(self.name).observe(spent)
        except Abandoned:
            pass
        except ImagesFailed as error:
            failures = dict(error.failed)
        except Exception as error:  # noqa: BLE001  told to whoever asked; the others go on
            failures = dict.fromkeys(range(len(units)), error)
        with self._lock:
            for index, failure in failures.items():
                self._fail(units[index][0], failure)
            lane.drawing = ()
            self._tell_places()
            self._count(-len(units))
            self._lock.notify_all()

    def _fail(self, job: Job, error: Exception) -> None:
        job.unfinished = 0
        with contextlib.suppress(ValueError):
            self._waiting.remove(job)
        if not job.cancelled:
            job.cancelled = True
            job.tell(Failed(error))

    def _tell_scale(self, units: list[Unit], event: ScaleEvent) -> None:
        job, place = units[event.image]
        if event.image == 0:
            self._metrics.scale_seconds.labels(self.name, str(event.index)).observe(event.ms / 1e3)
            if all(one.cancelled for one, _ in units):
                raise Abandoned
        if event.index in job.watched and not job.cancelled:
            if isinstance(event.preview, Preview):
                event.preview.keep()  # here and now: the memory is this thread's
            encoded = None
            if self._is_on_host:  # beside the next scale it would take longer, and that scale too
                with contextlib.suppress(Exception):  # met again, and told, by whoever answers
                    encoded = job.encode_preview(event)
            job.tell(Scale(place, event, encoded))

    def _tell_image(self, units: list[Unit], image: GeneratedImage) -> None:
        job, place = units[image.index]
        try:
            news: Finished | Failed = Finished(place, image, None if job.cancelled else job.encode(image))
        except Exception as error:  # noqa: BLE001  told to whoever asked
            news = Failed(error)
        with self._lock:
            job.unfinished -= 1
        self._metrics.images.labels(self.name).inc()
        job.tell(news)
