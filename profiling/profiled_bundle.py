"""A bundle on its device, ready to draw the profiled image repeatedly, whole or launch by launch."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..core.noise import seeded_noise, seeds_from
from ..engines.base import Backend
from ..engines.bundle.bundle import Bundle
from ..engines.bundle.manifest import Manifest
from ..errors import InputError
from ..runtime.memory.layout import EngineCall, StepCalls
from ..runtime.output import ImageTimings, ScaleTiming
from ..runtime.preview import to_image
from ..runtime.requests.inputs import ConditioningInputs, ImageInput, TextInput, draws_labels
from ..runtime.requests.settings import SamplingSettings, default_settings, with_overrides
from ..runtime.session import Session
from .records import KeptMap, Request

DEFAULT_PROMPT = "a red circle above a blue square"
DEFAULT_LABEL = "0"
Launched = Iterator[tuple[StepCalls | None, EngineCall, float]]


class ProfiledBundle:
    """Draws one image repeatedly, or a pass of several, with the same prompt, seeds and settings.

    A bundle without a text encoder draws from random text features; its scales cost the same.

    Raises:
        InputError: a prompt for a bundle without a text encoder, or a setting out of range.
        BundleError: the bundle has no engines for the requested guidance.
    """

    def __init__(self, bundle: Bundle, request: Request, backend: Backend | None = None) -> None:
        self.manifest = bundle.manifest
        self.settings = settings_of(bundle, request)
        self.prompt = prompt_of(bundle, request)
        self.images = request.batch
        self._noises = [seeded_noise(seed) for seed in seeds_from(request.seed, self.images)]
        self._given = given_of(bundle, request)
        self._session = Session(bundle, threads=request.threads, backend=backend, batch=self.images)
        self.workspace = self._session.workspace(self.settings.rows, self.images)
        self._all_settings = [self.settings] * self.images
        self.device = self._session.device
        self._features = random_features(self.manifest)

    def timed_image(self) -> ImageTimings:
        """Draw the images as a pipeline does; the times are the device's, in milliseconds, and those of all images."""
        start = self.device.record_event()
        self._give()
        told = self.device.record_event()
        steps = [
            ScaleTiming(calls.step.index, calls.step.size, calls.step.tokens, calls.step.kept, ms, self.images)
            for calls, ms in self.workspace.run_scales(self._noises, self._all_settings, wait=False)
        ]
        begun = time.perf_counter()
        for image in range(self.images):
            self.workspace.decode(image)  # waits
        decode_ms = (time.perf_counter() - begun) * 1e3
        self._session.save_compiled_kernels()
        return ImageTimings(self.device.elapsed_ms(start, told), tuple(steps), decode_ms, self.images)

    def launches(self) -> Launched:
        """Draw the image launch by launch."""
        text = [self._given] * self.images if isinstance(self._given, TextInput) else None
        if text is None:
            self._give()
        yield from self.workspace.timed_launches(self._noises, self._all_settings, text)

    def kept_maps(self) -> Iterator[KeptMap]:
        """Draw the image and read, at each pruned scale, which tokens were kept."""
        self._give()
        for calls, _ in self.workspace.run_scales(self._noises, self._all_settings):
            if calls.kept:
                yield self._kept_map(calls)

    def image_png(self) -> bytes:
        """The last drawn image as a PNG file."""
        file = io.BytesIO()
        to_image(self.workspace.decode()).save(file, "PNG")
        return file.getvalue()

    def _kept_map(self, calls: StepCalls) -> KeptMap:
        rows, step = calls.rows, calls.step
        views = [view for sub_layers in calls.kept.values() for view in sub_layers.values()]
        counts = np.zeros(step.tokens, np.int64)
        for view in views:
            kept = self.workspace.read_view(view)  # indices into [L * R], rows innermost, the first image's the first
            counts[kept[kept % rows == 0] // rows] += 1
        grid = tuple(tuple(int(n) for n in line) for line in counts.reshape(step.size))
        return KeptMap(step.index, step.size, step.kept, len(views), grid)

    def _give(self) -> None:
        if self._given is not None:
            self.workspace.give([self._given] * self.images)
        else:
            length, conditioning = self._features.shape[1], self.workspace.layout.conditioning
            reads_both = conditioning is not None and "uncond" in conditioning.tensors
            uncond = self._features[1] if reads_both else None
            self.workspace.set_features(self._features[0], uncond, (length,) * self.settings.rows)


def settings_of(bundle: Bundle, request: Request) -> SamplingSettings:
    """The bundle's default settings with the requested guidance scale."""
    return with_overrides(default_settings(bundle.manifest), guidance_scale=request.guidance_scale)


def prompt_of(bundle: Bundle, request: Request) -> str | None:
    """The prompt or class label to draw; None for a bundle without a text encoder.

    Raises:
        InputError: the request has a prompt, and the bundle has no text encoder.
    """
    manifest = bundle.manifest
    if draws_labels(manifest):
        return DEFAULT_LABEL if request.prompt is None else request.prompt
    if manifest.text_tokenizer is not None and manifest.text_encoder:
        return DEFAULT_PROMPT if request.prompt is None else request.prompt
    if request.prompt is not None:
        raise InputError(
            f"{bundle.path} has no text encoder, so it cannot read a prompt",
            fix="leave --prompt away: random text features are drawn from instead",
        )
    return None


def given_of(bundle: Bundle, request: Request) -> ImageInput | None:
    """The input of the image; None for a bundle without a text encoder.

    Raises:
        InputError: as `prompt_of`, or the prompt is empty or too long, or the class is unknown.
    """
    prompt = prompt_of(bundle, request)
    if prompt is None:
        return None
    subjects = ConditioningInputs(bundle)
    (subject,) = subjects.of(None, prompt) if draws_labels(bundle.manifest) else subjects.of(prompt)
    return subjects.given(subject, None, settings_of(bundle, request))


def random_features(manifest: Manifest) -> NDArray[np.float32]:
    """Random text features [2, T, Ct], float32, to time or compare scales without a text encoder."""
    shape = (2, manifest.text_length, manifest.transformer.text_width)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
