"""One pass at a time: launches prepared once on static memory, then the loop over scales as a generator.

Knows backends only through `Engine.prepare`, devices only through `Device`, and memory only through `Memory`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.dtypes import all_finite
from ..core.noise import SCALARS, Noise, draw_all
from ..core.tensors import Launch
from ..engines.base import Engine
from ..engines.bundle.manifest import Manifest
from ..engines.device import run_sequentially
from ..errors import InternalError, NumericsError
from .conditioning import Conditioning, TextFeatures
from .memory.arena import Memory
from .memory.bound_layout import BoundLayout
from .memory.layout import EngineCall, StepCalls, View
from .requests.inputs import ImageInput, TextInput
from .requests.settings import SamplingSettings

_Told = TypeVar("_Told")


@dataclass
class PreparedStep:
    """One scale: its launches one by one, as `calls.calls` lists them, and all of them recorded as one."""

    calls: StepCalls
    launches: list[Launch]
    run: Launch


class Workspace:
    """Static memory and prepared launches for a pass: so many images, each with a given number of guidance rows.

    What is said of an image is said once, or, for several images, in a list with an entry for each. `uncond` is the
    learned unconditional text [<= T, Ct], fp32, where the model has one. Without `captures` launches are made one by
    one, on a device too that can capture those of a scale as one graph.
    """

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        memory: Memory,
        rows: int,
        uncond: NDArray[np.float32] | None,
        captures: bool = True,
        images: int = 1,
    ) -> None:
        self.manifest, self.images, self.device = manifest, images, memory.device
        self.layout = layout = memory.layout(rows, images)
        self._bound = BoundLayout(layout, engines, memory)
        self._captured = self.device.capture_graph if captures else run_sequentially
        self._conditioning = Conditioning(self._bound, manifest, uncond, self._captured)
        self._steps = [self._prepare_step(calls) for calls in layout.steps]
        self._decode_launches = [self._bound.prepare(call) for call in layout.decode]
        self._decode = self._captured(self._decode_launches)
        self.failed: dict[int, NumericsError] = {}  # images of the last pass, where others are sound

    def _prepare_step(self, calls: StepCalls) -> PreparedStep:
        launches = [self._bound.prepare(call) for call in calls.calls]
        return PreparedStep(calls, launches, self._captured(launches))

    def read(self, call: EngineCall, name: str) -> NDArray[Any]:
        """The tensor an engine call is bound to: on the CPU a live view, from a GPU a copy; bfloat16 as uint16."""
        return self._bound.read(self._bound.view(call, name))

    def read_view(self, view: View) -> NDArray[Any]:
        """The tensor at a place of the layout."""
        return self._bound.read(view)

    def write(self, call: EngineCall, name: str, values: Any) -> None:
        """Give an engine call other values than an earlier one wrote."""
        self._bound.write(self._bound.view(call, name), values)

    def _each(self, told: _Told | Sequence[_Told]) -> Sequence[_Told]:
        """What was told of every image."""
        found = told if isinstance(told, Sequence) else [told]
        if len(found) != self.images:
            raise InternalError(f"{len(found)} of {self.images} images are told of")
        return found

    def encode_image(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """An image [3, H, W] in [-1, 1] -> its latent [bits, h, w], before quantisation. Before the text, if at all:
        its memory is used again for everything else.

        Raises:
            NumericsError: the image encoder gave numbers that are not finite.
        """
        if self.layout.encoder is None:
            raise InternalError("the bundle has no image encoder")
        self.write(self.layout.encoder, "image", image[None])
        self._encode_image()
        latent: NDArray[np.float32] = np.array(self.read(self.layout.encoder, "latent")[0])
        if not np.isfinite(latent).all():
            raise _not_finite("the image encoder")
        return latent

    @cached_property
    def _encode_image(self) -> Launch:
        """Prepared when first used: who only draws never loads the engine."""
        return self._bound.prepare(self.layout.encoder)

    def give(self, given: ImageInput | Sequence[ImageInput]) -> None:
        """Tell what the images are drawn from: texts, which are encoded, or classes; condition the layers by it."""
        self._conditioning.give(self._each(given))

    def set_features(self, cond: NDArray[Any], uncond: NDArray[Any] | None, lengths: tuple[int, ...]) -> None:
        """The same from text features [<= T, Ct] of each guidance row, of which so many count; for all images alike."""
        self._conditioning.give_features([TextFeatures(cond, uncond, lengths)] * self.images)

    def give_features(self, features: Sequence[TextFeatures]) -> None:
        """The same, for each image its own."""
        self._conditioning.give_features(self._each(features))

    def run_scales(
        self,
        noise: Noise | Sequence[Noise],
        settings: SamplingSettings | Sequence[SamplingSettings],
        *,
        wait: bool = True,
    ) -> Iterator[tuple[StepCalls, float]]:
        """Run scale after scale; yields each step with its milliseconds on the device.

        noise(scale index, shape, name of the input): Infinity's [L, bits a token] is uniform in [0, 1), -1 forces a bit
        to one, 2 to zero; where codes are chosen it is [L, 1], and -1 - i forces code i.
        `wait`: yield every step when it is done; else the device is given all of them, and all are yielded then.

        Of several images those whose numbers are not finite are in `failed` afterwards.

        Raises:
            NumericsError: a scale gave numbers that are not finite, of the only image or of all; names scale and layer.
        """
        noises, all_settings = self._each(noise), self._each(settings)
        self._reset(all_settings)
        given: list[tuple[PreparedStep, Any, Any]] = []
        for step in self._steps:
            self._draw_noise(step.calls, noises)
            start = self.device.record_event()
            step.run()
            given.append((step, start, self.device.record_event()))
            if wait:
                yield self._finished(*given.pop(), noises, all_settings)
        for step, start, end in given:
            yield self._finished(step, start, end, noises, all_settings)

    def _finished(
        self,
        step: PreparedStep,
        start: Any,
        end: Any,
        noises: Sequence[Noise],
        settings: Sequence[SamplingSettings],
    ) -> tuple[StepCalls, float]:
        logits = self.read(step.calls.sampling_head, "logits")  # waits
        if not np.isfinite(logits).all():
            by_image = np.isfinite(logits.reshape(-1, self.images, logits.shape[-1])).all(axis=(0, 2))
            for image in np.flatnonzero(~by_image):
                self.failed.setdefault(int(image), _not_finite(_scale(step.calls)))
            if len(self.failed) == self.images:
                raise _not_finite(self._first_bad_launch(noises, settings) or _scale(step.calls))
        return step.calls, self.device.elapsed_ms(start, end)

    def timed_launches(
        self,
        noise: Noise | Sequence[Noise],
        settings: SamplingSettings | Sequence[SamplingSettings],
        text: TextInput | Sequence[TextInput] | None = None,
    ) -> Iterator[tuple[StepCalls | None, EngineCall, float]]:
        """Draw the images launch by launch, to see where time goes: the step (None before and behind the scales), the
        call, and its milliseconds on the device. Recorded launches are not used.

        `text`: encoded first, as one launch whatever it takes; else the image is of the text last given.
        """
        noises = self._each(noise)
        if text is not None:
            yield from self._timed_encoder(self._each(text))
        yield from self._timed(None, self._conditioning.calls, self._conditioning.launches)
        self._reset(self._each(settings))
        for step in self._steps:
            self._draw_noise(step.calls, noises)
            yield from self._timed(step.calls, step.calls.calls, step.launches)
        for image in range(self.images):
            self._bring_codes(image)
            yield from self._timed(None, self.layout.decode, self._decode_launches)

    def _timed_encoder(self, texts: Sequence[TextInput]) -> Iterator[tuple[None, EngineCall, float]]:
        start = self.device.record_event()
        counted = self._conditioning.encode(texts)
        end = self.device.record_event()
        self._conditioning.tell_what_counts(counted)
        self.device.wait()
        assert self.layout.text_encoder is not None
        yield None, self.layout.text_encoder, self.device.elapsed_ms(start, end)

    def _timed(
        self, step: StepCalls | None, calls: Sequence[EngineCall], launches: Sequence[Launch]
    ) -> Iterator[tuple[StepCalls | None, EngineCall, float]]:
        for call, launch in zip(calls, launches, strict=True):
            start = self.device.record_event()
            launch()
            end = self.device.record_event()
            self.device.wait()
            yield step, call, self.device.elapsed_ms(start, end)

    def _draw_noise(self, calls: StepCalls, noises: Sequence[Noise]) -> None:
        for name, view in calls.drawn.items():
            self._bound.write(view, draw_all(noises, calls.step, view.shape, name))

    def _reset(self, settings: Sequence[SamplingSettings]) -> None:
        self.failed = {}
        first = self.layout.steps[0].sampling_head
        self.write(first, "summed", 0.0)
        for name in settings[0].scalars:
            if name in self._scalars:
                self._bound.write(self._scalars[name], [own.scalars[name] for own in settings])

    @cached_property
    def _scalars(self) -> dict[str, View]:
        """Where settings go, by name: one place for all scales."""
        bound = {n: view for step in self.layout.steps for call in step.calls for n, view in call.tensors.items()}
        return {name: view for name in SCALARS if isinstance(view := bound.get(name), View)}

    def _first_bad_launch(self, noises: Sequence[Noise], settings: Sequence[SamplingSettings]) -> str | None:
        """Draw once more and look at what every launch writes: later launches overwrite where it began."""
        if not self._writes_finite(*self._conditioning.text_calls):
            return "the text features"
        for call, launch in zip(self._conditioning.calls, self._conditioning.launches, strict=True):
            launch()
            if not self._writes_finite(call):
                return "the condition" if call.layer is None else f"the condition of layer {call.layer}"
        self._reset(settings)
        for step in self._steps:
            self._draw_noise(step.calls, noises)
            for call, launch in zip(step.calls.calls, step.launches, strict=True):
                launch()
                if call is step.calls.sampling_head and not np.isfinite(self.read(call, "logits")).all():
                    return f"{_scale(step.calls)}, the head"
                if not self._writes_finite(call):
                    return f"{_scale(step.calls)}, {_part_of_scale(step.calls, call)}"
        return None

    def _writes_finite(self, *calls: EngineCall) -> bool:
        return all(
            all_finite(output.dtype, self.read(call, output.name))
            for call in calls
            for output in self.manifest.engines[call.engine].outputs
        )

    def decode(self, image: int = 0) -> NDArray[np.float32]:
        """The summed codes of an image as pixels [3, H, W] in [-1, 1]; on the CPU a view that the next one overwrites.

        Raises:
            NumericsError: the image decoder gave numbers that are not finite.
        """
        self._bring_codes(image)
        self._decode()
        assert self.layout.image is not None
        found = self.read_view(self.layout.image)
        pixels: NDArray[np.float32] = found[0] if self.manifest.tiles is None else found.swapaxes(0, 1)
        if not np.isfinite(pixels).all():
            raise _not_finite("the image decoder")
        return pixels

    def _bring_codes(self, image: int) -> None:
        """An image's codes to the decoder's input, which is their place where there is one image."""
        if self.layout.codes is None or self.layout.decoded is None:
            return
        self._bound.copy(self.layout.decoded.part(0), self.layout.codes.part(image))

    def summed_before(self, scale: int, image: int = 0) -> NDArray[np.float32]:
        """Running sum [bits, h, w] that the next scale, of this index, is going to add to; waits for the device."""
        calls = next(step.calls for step in self._steps if step.calls.step.index == scale)
        summed: NDArray[np.float32] = self.read(calls.sampling_head, "summed")[image]
        return summed

    def summed_codes(self, calls: StepCalls, image: int = 0) -> NDArray[np.float32]:
        """Running sum [bits, h, w] of an image after a scale."""
        summed: NDArray[np.float32] = self.read_view(calls.summed)[image]
        return summed


def _scale(calls: StepCalls) -> str:
    h, w = calls.step.size
    return f"scale {calls.step.index} ({h}x{w})"


def _part_of_scale(calls: StepCalls, call: EngineCall) -> str:
    if call.layer is not None:
        return f"layer {call.layer}"
    return "the residual" if call is calls.residual else "the tokens of the next scale"


def _not_finite(where: str) -> NumericsError:
    return NumericsError(
        f"{where}: numbers that are not finite",
        expected="finite activations",
        fix="check the checkpoint; in 16-bit engines prefer bfloat16 over float16",
    )
