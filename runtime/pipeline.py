"""The face of the runtime: load a bundle, call it with a prompt, get images. Never imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Backend
from ..engines.bundle import Bundle
from ..engines.dtypes import parse_bytes
from ..errors import InputError
from ..families import family_named
from ..schedule import Size
from .editing import Editing, given_tokens, inpainting, upscaling
from .events import GeneratedImage, ImageTimings, Output, ScaleEvent, ScaleTiming
from .generation import ImageInput, SamplingSettings, Workspace, default_settings, with_overrides
from .layout import StepCalls
from .noise import Noise, check_seed, uniform_noise
from .session import Session
from .source_image import read_image, read_mask
from .subjects import Subject, Subjects

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_IMAGES = 1024
OnScaleEnd = Callable[[ScaleEvent], None]
OnImageEnd = Callable[[GeneratedImage], None]


class Pipeline:
    """Draws images from a bundle.

    Thread-safe: memory is static, so images are drawn one at a time and further callers wait their turn.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        offload_text_encoder: bool = False,
        cuda_graphs: bool = True,
        memory_budget: str | int | None = None,
        backend: Backend | None = None,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._session = Session(
            bundle,
            threads=threads,
            offload_text_encoder=offload_text_encoder,
            cuda_graphs=cuda_graphs,
            memory_budget=parse_bytes(memory_budget) if isinstance(memory_budget, str) else memory_budget,
            backend=backend,
        )
        self._subjects = Subjects(bundle)
        self._turn = Lock()
        self._holder: int | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        verify: str = "auto",
        offload_text_encoder: bool = False,
        cuda_graphs: bool = True,
        memory_budget: str | int | None = None,
        trust_remote_code: bool = False,
        require_signature: str | Path | bytes | None = None,
    ) -> Pipeline:
        """Open a bundle, check its digests, place its weights and memory on the device.

        Args:
            path: folder made by `fastvar build`.
            threads: CPU threads; the library's choice by default.
            verify: "auto" hashes engines, and weights up to 256 MiB; "all" hashes everything.
            offload_text_encoder: on a GPU, copy the text encoder's weights there for every prompt, into memory that
                drawing uses afterwards; no effect on the CPU.
            cuda_graphs: on a GPU, replay the launches of a scale as one; no effect on the CPU.
            memory_budget: "15GiB", or bytes: refuse a bundle that would take more, rather than fail while drawing.
            trust_remote_code: run the native code of a bundle in a Hugging Face hub cache.
            require_signature: a public Ed25519 key in PEM, or its file: refuse a bundle that its owner did not sign.

        Raises:
            BundleError: damaged, incomplete, made for another version, or not trusted.
            BackendError: the backend's library, driver or device is missing or does not fit.
            DeviceMemoryError: the GPU has too little free memory, or the budget is too small; says what would fit.
            PlanError: the budget is no amount of memory.
        """
        bundle = Bundle.open(
            Path(path), verify, trust_remote_code=trust_remote_code, require_signature=require_signature
        )
        return cls(
            bundle,
            threads=threads,
            offload_text_encoder=offload_text_encoder,
            cuda_graphs=cuda_graphs,
            memory_budget=memory_budget,
        )

    @property
    def size(self) -> Size:
        """(height, width) in pixels."""
        return self.manifest.plan.schedule.pixels

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        class_labels: int | str | Sequence[int | str] | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        tau: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        num_images: int = 1,
        negative_prompt: str | None = None,
        callback_on_scale_end: OnScaleEnd | None = None,
        callback_on_image_end: OnImageEnd | None = None,
    ) -> Output:
        """Draw images, of prompts or of class labels, as the bundle's family draws.

        Args:
            prompt: one text, or several.
            class_labels: one class or several, by number, or by name where the checkpoint has names.
            seed: of the first image of each prompt or label; the next ones count up from it.
            guidance_scale: classifier-free guidance; Infinity's 1, VAR's and HART's 0 switches it off and runs half the
                work.
            tau: sampling temperature (Infinity).
            top_p: the rarest values of a choice go, as long as their probabilities sum to at most 1 - top_p.
            top_k: only so many codes are drawn from; 0 for all (VAR).
            num_images: images per prompt or label.
            negative_prompt: what to steer away from, in place of the learned unconditional text.
            callback_on_scale_end: called with a `ScaleEvent` after every scale.
            callback_on_image_end: called with a `GeneratedImage` as soon as each image is complete.

        Raises:
            InputError: a setting out of range or unknown to the family, a prompt too long for the bundle, or a class
                that it does not know.
        """
        settings = self._settings(guidance_scale, tau, top_p, top_k)
        subjects = self._subjects.of(prompt, class_labels)
        callbacks = (callback_on_scale_end, callback_on_image_end)
        return self._draw_all(subjects, seed, num_images, settings, negative_prompt, callbacks)

    def upscale(
        self,
        image: Image | str | Path,
        prompt: str,
        *,
        keep_scales: int | None = None,
        fit: str = "exact",
        consistency: bool = True,
        seed: int = 0,
        guidance_scale: float | None = None,
        tau: float | None = None,
        top_p: float | None = None,
        num_images: int = 1,
        negative_prompt: str | None = None,
        callback_on_scale_end: OnScaleEnd | None = None,
        callback_on_image_end: OnImageEnd | None = None,
    ) -> Output:
        """Enlarge an image to the bundle's size: its coarse scales are kept, the model draws the finer ones.

        Args:
            image: a PIL image or a file.
            prompt: what the image shows.
            keep_scales: how many scales are the image's; by default those whose token grid, at 16 pixels a token,
                does not exceed the image.
            fit: "crop" to cut another aspect ratio around the centre; "exact" refuses it.
            consistency: correct the result until, averaged down, it gives the image again (back-projection).

        The other arguments are those of a call.

        Raises:
            InputError: no encoder in the bundle, an image that cannot be used, or a setting out of range.
        """
        self._require_encoder()
        plan = self.manifest.plan
        edit = upscaling(read_image(image), plan, keep_scales=keep_scales, fit=fit, consistency=consistency)
        settings = self._settings(guidance_scale, tau, top_p)
        callbacks = (callback_on_scale_end, callback_on_image_end)
        return self._draw_all(self._subjects.of(prompt), seed, num_images, settings, negative_prompt, callbacks, edit)

    def inpaint(
        self,
        image: Image | str | Path,
        mask: Image | str | Path,
        prompt: str,
        *,
        fit: str = "exact",
        composite: bool = True,
        seed: int = 0,
        guidance_scale: float | None = None,
        tau: float | None = None,
        top_p: float | None = None,
        num_images: int = 1,
        negative_prompt: str | None = None,
        callback_on_scale_end: OnScaleEnd | None = None,
        callback_on_image_end: OnImageEnd | None = None,
    ) -> Output:
        """Redraw the white part of the mask: at every scale, tokens that it does not touch are the image's.

        Args:
            image: a PIL image or a file; resized to the bundle's size.
            mask: of the image's aspect ratio; white is redrawn.
            prompt: what the whole image shall show.
            fit: "crop" to cut another aspect ratio around the centre, of image and mask; "exact" refuses it.
            composite: put the image's own pixels back outside the mask, with a soft edge.

        The other arguments are those of a call.

        Raises:
            InputError: no encoder in the bundle, an image or mask that cannot be used, or a setting out of range.
        """
        self._require_encoder()
        edit = inpainting(read_image(image), read_mask(mask), self.manifest.plan, fit=fit, composite=composite)
        settings = self._settings(guidance_scale, tau, top_p)
        callbacks = (callback_on_scale_end, callback_on_image_end)
        return self._draw_all(self._subjects.of(prompt), seed, num_images, settings, negative_prompt, callbacks, edit)

    def _require_encoder(self) -> None:
        if not self.manifest.encoder:
            raise InputError(
                "this bundle has no image encoder, so it cannot read an image",
                fix="rebuild it with `fastvar build --with-encoder` (with_encoder=True)",
            )

    def _draw_all(
        self,
        subjects: list[Subject],
        seed: int,
        num_images: int,
        settings: SamplingSettings,
        negative_prompt: str | None,
        callbacks: tuple[OnScaleEnd | None, OnImageEnd | None],
        edit: Editing | None = None,
    ) -> Output:
        on_scale_end, on_image_end = callbacks
        seeds = _seeds(seed, num_images)
        given = [self._subjects.given(subject, negative_prompt, settings) for subject in subjects]
        noise_of = self._noise_around(edit, settings) if edit else seeded_noise
        record = self._record(settings, negative_prompt) | dict(edit.record if edit else {})
        draws = family_named(self.manifest.family).draws
        results: list[GeneratedImage] = []
        for subject, text in zip(subjects, given, strict=True):
            for s in seeds:
                image, timings = self._draw(text, noise_of(s), settings, on_scale_end)
                image = edit.finish(image) if edit else image
                results.append(GeneratedImage(len(results), image, str(subject), s, record, timings, draws))
                if on_image_end is not None:
                    on_image_end(results[-1])
        return Output(
            images=[result.image for result in results],
            prompts=[result.prompt for result in results],
            seeds=[result.seed for result in results],
            settings=record,
            timings=[result.timings for result in results],
            draws=draws,
        )

    def _noise_around(self, edit: Editing, settings: SamplingSettings) -> Callable[[int], Noise]:
        """Seed -> noise that forces the tokens kept of an image. Encodes the image."""
        with self._workspace(settings.rows) as workspace:
            latent = workspace.encode_image(edit.pixels)
        return given_tokens(latent, edit.kept, self.manifest.plan, self.manifest.transformer).noise

    def stream(
        self,
        prompt: str | None = None,
        *,
        class_label: int | str | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        tau: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        negative_prompt: str | None = None,
    ) -> Iterator[ScaleEvent]:
        """Draw one image scale by scale; `preview()` of the last event is not the image, call the pipeline for that.

        Settings are checked here; the pipeline is held from the first event until the iterator ends or is closed.
        """
        settings = self._settings(guidance_scale, tau, top_p, top_k)
        (subject,) = self._subjects.of(prompt, class_label)
        given = self._subjects.given(subject, negative_prompt, settings)
        return self._stream(given, check_seed(seed), settings)

    def _stream(self, given: ImageInput, seed: int, settings: SamplingSettings) -> Iterator[ScaleEvent]:
        with self._workspace(settings.rows) as workspace:
            workspace.give(given)
            yield from self._events(workspace, seeded_noise(seed), settings)

    def _draw(
        self, given: ImageInput, noise: Noise, settings: SamplingSettings, callback: OnScaleEnd | None
    ) -> tuple[Image, ImageTimings]:
        with self._workspace(settings.rows) as workspace:
            device = workspace.device
            start = device.mark()
            workspace.give(given)
            encoded = device.mark()
            scales: list[ScaleTiming] = []
            # Nobody listens: the device is given all scales at once.
            for event in self._events(workspace, noise, settings, wait=callback is not None):
                scales.append(ScaleTiming(event.index, event.size, event.tokens, event.kept, event.ms))
                if callback is not None:
                    callback(event)
            begun = time.perf_counter()
            image = to_image(workspace.decode())
            decode_ms = (time.perf_counter() - begun) * 1e3
            return image, ImageTimings(device.elapsed_ms(start, encoded), tuple(scales), decode_ms)

    def _events(
        self, workspace: Workspace, noise: Noise, settings: SamplingSettings, wait: bool = True
    ) -> Iterator[ScaleEvent]:
        for calls, ms in workspace.run_scales(noise, settings, wait=wait):
            step = calls.step
            yield ScaleEvent(step.index, step.size, step.tokens, step.kept, ms, self._previewer(workspace, calls))

    def _previewer(self, workspace: Workspace, calls: StepCalls) -> Callable[[], Image]:
        def preview() -> Image:
            # A linear map from codes to colour, fitted when the bundle was built: the decoder costs far more.
            codes = workspace.summed_codes(calls)
            weights = self._session.weights
            colour = np.tensordot(weights["preview.weight"], codes, axes=1)
            return to_image((colour + weights["preview.bias"][:, None, None]).clip(-1, 1)).resize(self.size[::-1])

        return preview

    @contextmanager
    def _workspace(self, rows: int) -> Iterator[Workspace]:
        if self._holder == get_ident():
            raise InputError(
                "this thread is still streaming an image from this pipeline",
                expected="one image at a time: memory is static",
                fix="finish or close the stream first, or load a second pipeline",
            )
        with self._turn:
            self._holder = get_ident()
            try:
                yield self._session.workspace(rows)
                self._session.settle()
            finally:
                self._holder = None

    def _settings(
        self, guidance_scale: float | None, tau: float | None, top_p: float | None, top_k: int | None = None
    ) -> SamplingSettings:
        defaults = default_settings(self.manifest)
        for name, value in (("tau", tau), ("top_k", top_k)):
            if value is not None and getattr(defaults, name) is None:
                raise InputError(f"{self.manifest.family} models have no {name}", fix="leave it away")
        return with_overrides(defaults, guidance_scale=guidance_scale, tau=tau, top_p=top_p, top_k=top_k)

    def _record(self, settings: SamplingSettings, negative: str | None) -> dict[str, Any]:
        return {
            "guidance_scale": settings.guidance_scale,
            **{name: value for name, value in (("tau", settings.tau), ("top_k", settings.top_k)) if value is not None},
            "top_p": settings.top_p,
            "negative_prompt": negative,
            "policy": self.manifest.plan.policy.name,
            "model": self.manifest.model,
            "size": f"{self.size[1]}x{self.size[0]}",
        }


def to_image(pixels: NDArray[np.float32]) -> Image:
    """[3, H, W] in [-1, 1] -> a PIL image, rounded to the nearest level."""
    from PIL import Image as PilImage

    levels = np.rint((pixels + 1) * 127.5).astype(np.uint8)
    return PilImage.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))


def seeded_noise(seed: int) -> Noise:
    """Noise of a seed, drawn anew for every scale."""
    return partial(uniform_noise, seed)


def _seeds(seed: int, count: int) -> list[int]:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_IMAGES:
        raise InputError(f"num_images {count!r} is out of range", expected=f"a whole number from 1 to {MAX_IMAGES}")
    return [check_seed(check_seed(seed) + i) for i in range(count)]
