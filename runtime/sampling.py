"""How a pipeline draws: requests become images, one turn each, and streams become events. Nothing is checked here."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf
from typing import TYPE_CHECKING, Any

from ..core.noise import Noise, seeded_noise
from ..core.plan import StepPlan
from ..core.schedule import Size
from ..families import family_named
from .editing.edits import Editing
from .editing.given_tokens import given_tokens
from .inputs import ImageInput, Subject
from .output import GeneratedImage, ImageTimings, Output, ScaleEvent, ScaleTiming
from .preview import Colours, Previews, to_image
from .session import Session
from .settings import SamplingSettings
from .turns import CallTurn, Turns, closed
from .workspace import Workspace

if TYPE_CHECKING:
    from PIL.Image import Image

OnScaleEnd = Callable[[ScaleEvent], object]
OnImageEnd = Callable[[GeneratedImage], object]


@dataclass(frozen=True)
class Request:
    """A call, checked: each subject is drawn with each seed. `record` is what the output tells of the settings."""

    subjects: list[Subject]
    given: list[ImageInput]
    seeds: list[int]
    settings: SamplingSettings
    record: dict[str, Any]
    edit: Editing | None = None
    on_scale_end: OnScaleEnd | None = None
    on_image_end: OnImageEnd | None = None


class ImageSampler:
    """Draws with a session, until it is closed: then the session goes, and with it engines and memory."""

    def __init__(self, session: Session, turns: Turns) -> None:
        self._session: Session | None = session
        self._turns = turns

    @property
    def session(self) -> Session:
        """What is drawn with.

        Raises:
            InputError: it was closed.
        """
        if self._session is None:
            raise closed()
        return self._session

    @property
    def is_closed(self) -> bool:
        return self._session is None

    def close(self, timeout: float | None) -> None:
        self._turns.close(self._free, timeout)

    def _free(self) -> None:
        self._session = None

    def images(self, request: Request, timeout: float | None) -> Output:
        """Draw all of a request; `timeout` is for its first turn."""
        record, edit = request.record, request.edit
        noise_of: Callable[[int], Noise] = seeded_noise
        if edit is not None:
            noise_of, timeout = self._noise_around(edit, request.settings, timeout), inf
            record = record | dict(edit.record)
        draws = family_named(self.session.manifest.family).draws
        results: list[GeneratedImage] = []
        for subject, given in zip(request.subjects, request.given, strict=True):
            for seed in request.seeds:
                image, timings = self._image(given, noise_of(seed), request, timeout)
                timeout = inf  # what was begun is not lost because others draw in between
                image = edit.finish(image) if edit else image
                results.append(GeneratedImage(len(results), image, str(subject), seed, record, timings, draws))
                if request.on_image_end is not None:
                    request.on_image_end(results[-1])
        return Output(
            images=[result.image for result in results],
            prompts=[result.prompt for result in results],
            seeds=[result.seed for result in results],
            settings=record,
            timings=[result.timings for result in results],
            draws=draws,
        )

    def _noise_around(self, edit: Editing, settings: SamplingSettings, timeout: float | None) -> Callable[[int], Noise]:
        """Seed -> noise that forces the tokens kept of an image. Encodes the image."""
        with self._turns.taken(CallTurn(), timeout):
            session = self.session
            latent = session.workspace(settings.rows).encode_image(edit.pixels)
            session.save_compiled_kernels()
        return given_tokens(latent, edit.kept, session.manifest, session.weights).noise

    def _image(
        self, given: ImageInput, noise: Noise, request: Request, timeout: float | None
    ) -> tuple[Image, ImageTimings]:
        turn = CallTurn()
        with self._turns.taken(turn, timeout):
            session = self.session
            workspace = session.workspace(request.settings.rows)
            device = workspace.device
            start = device.record_event()
            workspace.give(given)
            encoded = device.record_event()
            if request.on_scale_end is None:  # nobody listens: the device is given all scales at once
                run = workspace.run_scales(noise, request.settings, wait=False)
                scales = [ScaleTiming(*_facts(calls.step), ms) for calls, ms in run]
            else:
                scales = self._tell(self._events(workspace, noise, request.settings), turn, request.on_scale_end)
            begun = time.perf_counter()
            image = to_image(workspace.decode())
            decode_ms = (time.perf_counter() - begun) * 1e3
            session.save_compiled_kernels()
            return image, ImageTimings(device.elapsed_ms(start, encoded), tuple(scales), decode_ms)

    def _tell(
        self, all_events: Generator[ScaleEvent, None, None], turn: CallTurn, listener: OnScaleEnd
    ) -> list[ScaleTiming]:
        """Run all scales, and tell of each."""
        scales: list[ScaleTiming] = []
        with closing(all_events) as events:
            for event in events:
                scales.append(ScaleTiming(event.index, event.size, event.tokens, event.kept, event.ms))
                with turn.in_callback():
                    listener(event)
                del event  # unless the listener holds it, its preview need not be kept
        return scales

    def scales(self, given: ImageInput, seed: int, settings: SamplingSettings) -> Generator[ScaleEvent, None, None]:
        """What a stream steps through, its turn once taken."""
        session = self.session
        workspace = session.workspace(settings.rows)
        workspace.give(given)
        yield from self._events(workspace, seeded_noise(seed), settings)
        session.save_compiled_kernels()

    def _events(
        self, workspace: Workspace, noise: Noise, settings: SamplingSettings
    ) -> Generator[ScaleEvent, None, None]:
        previews = Previews(self._colours)
        for calls, ms in workspace.run_scales(noise, settings):
            try:
                yield ScaleEvent(*_facts(calls.step), ms, previews.of(partial(workspace.summed_codes, calls)))
            finally:  # also where the reader stops here, and others draw
                previews.keep()

    @cached_property
    def _colours(self) -> Colours:
        return Colours(self.session.weights, self.session.manifest.plan.schedule.pixels)


def _facts(step: StepPlan) -> tuple[int, Size, int, int]:
    return step.index, step.size, step.tokens, step.kept
