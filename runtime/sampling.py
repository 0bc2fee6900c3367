"""How a pipeline draws: requests become images, one turn each, and streams become events. Nothing is checked here."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf
from typing import TYPE_CHECKING

from ..core.noise import Noise, seeded_noise
from ..core.plan import StepPlan
from ..core.schedule import Size
from ..errors import ImagesFailed, NumericsError
from ..families import family_named
from .editing.given_tokens import GivenTokens, given_tokens
from .output import GeneratedImage, ImageTimings, Output, ScaleEvent, ScaleTiming
from .preview import Colours, Previews, to_image
from .requests.inputs import ImageInput
from .requests.passes import ImageRequest, passes
from .requests.settings import SamplingSettings
from .session import Session
from .turns import CallTurn, Turns, closed
from .workspace import Workspace

if TYPE_CHECKING:
    from PIL.Image import Image

OnScaleEnd = Callable[[ScaleEvent], object]
OnImageEnd = Callable[[GeneratedImage], object]


@dataclass(frozen=True)
class Listeners:
    """The callbacks of a call."""

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

    def prepare(self, rows: int, images: int, timeout: float | None) -> None:
        """Load the engines of a pass, and bind them to its memory."""
        with self._turns.taken(CallTurn(), timeout):
            self.session.workspace(rows, images)
            self.session.save_compiled_kernels()

    def images(self, requests: Sequence[ImageRequest], listeners: Listeners, timeout: float | None) -> Output:
        """Draw images, in as few passes as the bundle has engines for; `timeout` is for the first turn.

        Raises:
            ImagesFailed: some have numbers that are not finite; the others are in its output.
            NumericsError: the only one has.
        """
        session, draws = self.session, family_named(self.session.manifest.family).draws
        results: list[GeneratedImage] = []
        failed: dict[int, NumericsError] = {}
        for together in passes(requests, session.batch_sizes):
            drawn = self._pass(together, failed, draws, listeners.on_scale_end, timeout)
            timeout = inf  # what was begun is not lost because others draw in between
            for result in drawn:
                results.append(result)
                if listeners.on_image_end is not None:
                    listeners.on_image_end(result)
        output = Output.of(results, draws)
        if failed and len(requests) == 1:
            raise failed[requests[0].index]
        if failed:
            raise ImagesFailed(failed, len(requests), output)
        return output

    def _pass(
        self,
        requests: Sequence[ImageRequest],
        failed: dict[int, NumericsError],
        draws: str,
        on_scale_end: OnScaleEnd | None,
        timeout: float | None,
    ) -> list[GeneratedImage]:
        """Images of one pass, those that are sound; what is wrong with the others goes into `failed`."""
        turn = CallTurn()
        with self._turns.taken(turn, timeout):
            session = self.session
            workspace = session.workspace(requests[0].settings.rows, len(requests))
            device = workspace.device
            noises = self._noises(workspace, requests)
            start = device.record_event()
            workspace.give([request.given for request in requests])
            encoded = device.record_event()
            try:
                scales = self._scales(workspace, noises, requests, turn, on_scale_end)
            except NumericsError as error:
                failed.update({request.index: error for request in requests})
                return []
            failed.update({requests[place].index: error for place, error in workspace.failed.items()})
            decoded = [self._decoded(workspace, place, request, failed) for place, request in enumerate(requests)]
            session.save_compiled_kernels()
            text_ms = device.elapsed_ms(start, encoded)
        return [
            GeneratedImage(
                request.index,
                request.edit.finish(image) if request.edit else image,
                str(request.subject),
                request.seed,
                request.record | (dict(request.edit.record) if request.edit else {}),
                ImageTimings(text_ms, tuple(scales), decode_ms, len(requests)),
                draws,
            )
            for request, (image, decode_ms) in zip(requests, decoded, strict=True)
            if image is not None
        ]

    def _noises(self, workspace: Workspace, requests: Sequence[ImageRequest]) -> list[Noise]:
        """Each image's noise; of an edited one it forces the tokens that are kept, by the sum in that image's place.
        Encodes what is edited, once.
        """
        session, tokens = self.session, dict[int, GivenTokens]()
        for edit in (request.edit for request in requests):
            if edit is not None and id(edit) not in tokens:
                latent = workspace.encode_image(edit.pixels)
                tokens[id(edit)] = given_tokens(latent, edit.kept, session.manifest, session.weights)
        return [
            seeded_noise(request.seed)
            if request.edit is None
            else tokens[id(request.edit)].noise(request.seed, partial(workspace.summed_before, image=place))
            for place, request in enumerate(requests)
        ]

    def _scales(
        self,
        workspace: Workspace,
        noises: Sequence[Noise],
        requests: Sequence[ImageRequest],
        turn: CallTurn,
        listener: OnScaleEnd | None,
    ) -> list[ScaleTiming]:
        """Run all scales, and tell of each."""
        settings, count = [request.settings for request in requests], len(requests)
        if listener is None:  # nobody listens: the device is given all scales at once
            run = workspace.run_scales(noises, settings, wait=False)
            return [ScaleTiming(*_facts(calls.step), ms, count) for calls, ms in run]
        scales: list[ScaleTiming] = []
        indices = [request.index for request in requests]
        with closing(self._events(workspace, noises, settings, indices)) as events:
            for told in events:
                event = told[0]
                scales.append(ScaleTiming(event.index, event.size, event.tokens, event.kept, event.ms, count))
                with turn.in_callback():
                    for event in told:
                        listener(event)
                del event, told  # unless the listener holds them, their previews need not be kept
        return scales

    def _decoded(
        self, workspace: Workspace, place: int, request: ImageRequest, failed: dict[int, NumericsError]
    ) -> tuple[Image | None, float]:
        """An image of the pass and the milliseconds that it took; none that has failed."""
        if place in workspace.failed:
            return None, 0.0
        begun = time.perf_counter()
        try:
            image = to_image(workspace.decode(place))
        except NumericsError as error:
            failed[request.index] = error
            return None, 0.0
        return image, (time.perf_counter() - begun) * 1e3

    def scales(self, given: ImageInput, seed: int, settings: SamplingSettings) -> Generator[ScaleEvent, None, None]:
        """What a stream steps through, its turn once taken."""
        session = self.session
        workspace = session.workspace(settings.rows)
        workspace.give(given)
        with closing(self._events(workspace, [seeded_noise(seed)], [settings], [0])) as events:
            for told in events:
                yield told.pop()
        session.save_compiled_kernels()

    def _events(
        self,
        workspace: Workspace,
        noises: Sequence[Noise],
        settings: Sequence[SamplingSettings],
        indices: Sequence[int],
    ) -> Generator[list[ScaleEvent], None, None]:
        """After every scale an event for each image of the pass."""
        previews = [Previews(self._colours) for _ in indices]
        for calls, ms in workspace.run_scales(noises, settings):
            try:
                yield [
                    ScaleEvent(
                        *_facts(calls.step),
                        ms,
                        len(indices),
                        own.of(partial(workspace.summed_codes, calls, place)),
                        index,
                    )
                    for place, (own, index) in enumerate(zip(previews, indices, strict=True))
                ]
            finally:  # also where the reader stops here, and others draw
                for own in previews:
                    own.keep()

    @cached_property
    def _colours(self) -> Colours:
        return Colours(self.session.weights, self.session.manifest.plan.schedule.pixels)


def _facts(step: StepPlan) -> tuple[int, Size, int, int]:
    return step.index, step.size, step.tokens, step.kept
