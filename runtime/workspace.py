"""One image at a time: launches prepared once on static memory, then the loop over scales as a generator.

Knows backends only through `Engine.prepare`, devices only through `Device`, and memory only through `Memory`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.dtypes import all_finite
from ..core.noise import SCALARS, Noise, draw
from ..core.tensors import Launch
from ..engines.base import Engine
from ..engines.bundle.manifest import Manifest
from ..engines.device import run_sequentially
from ..errors import InternalError, NumericsError
from .inputs import ImageInput, TextInput
from .memory.arena import Memory
from .memory.layout import EngineCall, StepCalls, View
from .prompt import TokenizedPrompt
from .settings import SamplingSettings


@dataclass
class PreparedStep:
    """One scale: its launches one by one, as `calls.calls` lists them, and all of them recorded as one."""

    calls: StepCalls
    launches: list[Launch]
    run: Launch


class Workspace:
    """Static memory and prepared launches for one image with a given number of guidance rows.

    `uncond` is the learned unconditional text [<= T, Ct], fp32, where the model has one. Without `captures` launches
    are made one by one, on a device too that can capture those of a scale as one graph.
    """

    def __init__(
        self,
        manifest: Manifest,
        engines: Mapping[str, Engine],
        memory: Memory,
        rows: int,
        uncond: NDArray[np.float32] | None,
        captures: bool = True,
    ) -> None:
        self.manifest, self.layout = manifest, memory.layout(rows)
        self._format = manifest.prompt_format
        self.device = memory.device
        self._engines, self._memory, self._uncond = engines, memory, uncond
        self._captured = self.device.capture_graph if captures else run_sequentially
        layout = self.layout
        self._text_encoder = self._prepare(layout.text_encoder)
        self._uncond_encoder = self._prepare(layout.uncond_encoder)
        self._condition_launches = [self._prepare(call) for call in self._condition_calls]
        self._condition = self._captured(self._condition_launches)
        self._steps = [self._prepare_step(calls) for calls in layout.steps]
        self._decode_launches = [self._prepare(call) for call in layout.decode]
        self._decode = self._captured(self._decode_launches)

    def _prepare_step(self, calls: StepCalls) -> PreparedStep:
        launches = [self._prepare(call) for call in calls.calls]
        return PreparedStep(calls, launches, self._captured(launches))

    def _prepare(self, call: EngineCall | None) -> Launch:
        if call is None:
            return _nothing
        engine = self._engines[call.engine]
        tensors = {name: self._memory.ref(self.layout, binding) for name, binding in call.tensors.items()}
        launch = engine.prepare(tensors, self._memory.scratch(self.layout, call.scratch, engine.scratch_bytes))
        return self._with_copies(launch, call) if call.copies else launch

    def _with_copies(self, launch: Launch, call: EngineCall) -> Launch:
        copies = [tuple(self._memory.ref(self.layout, view) for view in (c.target, c.source)) for c in call.copies]
        device = self.device  # not `self`: memory goes with the workspace, not with the next garbage collection

        def run() -> None:
            launch()
            for target, source in copies:
                device.copy(target, source)

        return run

    def read(self, call: EngineCall, name: str) -> NDArray[Any]:
        """The tensor an engine call is bound to: on the CPU a live view, from a GPU a copy; bfloat16 as uint16."""
        return self._memory.read(self.layout, self._view(call, name))

    def read_view(self, view: View) -> NDArray[Any]:
        """The tensor at a place of the layout."""
        return self._memory.read(self.layout, view)

    def _write(self, call: EngineCall, name: str, values: Any) -> None:
        self._memory.write(self.layout, self._view(call, name), np.asarray(values))

    def _view(self, call: EngineCall, name: str) -> View:
        view = call.tensors[name]
        if not isinstance(view, View):
            raise InternalError(f"{call.engine}: {name} is a weight")
        return view

    def encode_image(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """An image [3, H, W] in [-1, 1] -> its latent [bits, h, w], before quantisation. Before the text, if at all:
        its memory is used again for everything else.

        Raises:
            NumericsError: the image encoder gave numbers that are not finite.
        """
        if self.layout.encoder is None:
            raise InternalError("the bundle has no image encoder")
        self._write(self.layout.encoder, "image", image[None])
        self._encode_image()
        latent: NDArray[np.float32] = np.array(self.read(self.layout.encoder, "latent")[0])
        if not np.isfinite(latent).all():
            raise _not_finite("the image encoder")
        return latent

    @cached_property
    def _encode_image(self) -> Launch:
        """Prepared when first used: who only draws never loads the engine."""
        return self._prepare(self.layout.encoder)

    def give(self, given: ImageInput) -> None:
        """Tell what the image is drawn from: condition, and what it gives to each layer."""
        if isinstance(given, TextInput):
            self.encode_text(given)
            return
        classes = self.manifest.transformer.classes
        self._write(self._condition_call, "labels", [given.label, classes][: self.layout.rows])
        self._condition()

    def encode_text(self, text: TextInput) -> None:
        """Run the text encoder for the prompt, and for the negative prompt or with the learned rows."""
        self._finish_text(self._encode_texts(text))

    def _encode_texts(self, text: TextInput) -> list[NDArray[np.bool_]]:
        """Features of every guidance row; gives which of them count."""
        self._memory.bring_text_encoder(self.layout)
        counted = [self._encode(text.prompt, self.layout.text_encoder, self._text_encoder)]
        if self.layout.rows == 2 and self._uncond is not None and text.negative is None:
            # The learned text is cut to the prompt's length, so its effect depends on that length (upstream).
            self._set_features("uncond", self._uncond, text.prompt.length)
            counted *= 2
        elif text.negative is not None:
            counted.append(self._encode(text.negative, self.layout.uncond_encoder, self._uncond_encoder))
        return counted

    def _encode(self, prompt: TokenizedPrompt, call: EngineCall | None, launch: Launch) -> NDArray[np.bool_]:
        if call is None:
            raise InternalError("the bundle has no text encoder; give text features instead")
        self._write(call, "ids", prompt.ids)
        self._write(call, "attention_mask", prompt.mask)
        launch()
        view = self._view(call, "features")
        counted: NDArray[np.bool_] = prompt.mask[0, -view.shape[0] :].astype(bool)  # without the prefix
        if not self._format.keeps_padding:
            self._clear_padding(view, counted)
        return counted

    def set_features(self, cond: NDArray[Any], uncond: NDArray[Any] | None, lengths: tuple[int, ...]) -> None:
        """Text features [<= T, Ct] of each guidance row and how many of them count; then condition and text keys."""
        for name, features, length in zip(("cond", "uncond"), (cond, uncond), lengths, strict=False):
            if features is not None and name in self._condition_call.tensors:
                self._set_features(name, features, length)
        self._finish_text([self._counted(length) for length in lengths])

    def _set_features(self, name: str, features: NDArray[Any], length: int) -> None:
        view = self._view(self._condition_call, name)
        padded = np.zeros(view.shape, np.float32)
        own = features if self._format.keeps_padding else features[:length]
        padded[: len(own)] = own
        self._memory.write(self.layout, view, padded)

    def _clear_padding(self, view: View, counted: NDArray[np.bool_]) -> None:
        """Rows beside the text: they are masked, not left out, so they must be finite."""
        padding, row_bytes = np.flatnonzero(~counted), view.size // view.shape[0]
        if padding.size:
            start = view.start + int(padding[0]) * row_bytes
            beside = replace(view, start=start, shape=(padding.size, view.shape[1]))
            self._memory.write(self.layout, beside, np.zeros(1))

    def _counted(self, length: int) -> NDArray[np.bool_]:
        """Which tokens count, where so many do."""
        tokens = np.arange(self.manifest.text_length)
        return tokens >= len(tokens) - length if self._format.pad_left else tokens < length

    def _finish_text(self, counted: Sequence[NDArray[np.bool_]]) -> None:
        self._write_mask(counted)
        self._condition()

    def _write_mask(self, counted: Sequence[NDArray[np.bool_]]) -> None:
        view = self._view(self._condition_call, "mask")  # of the rows that are given text
        self._memory.write(self.layout, view, np.stack(counted[: view.shape[0]]))

    @property
    def _condition_call(self) -> EngineCall:
        assert self.layout.conditioning is not None
        return self.layout.conditioning

    @property
    def _condition_calls(self) -> tuple[EngineCall, ...]:
        return (self._condition_call, *self.layout.layer_conditioning)

    def run_scales(
        self, noise: Noise, settings: SamplingSettings, *, wait: bool = True
    ) -> Iterator[tuple[StepCalls, float]]:
        """Run scale after scale; yields each step with its milliseconds on the device.

        noise(scale index, shape, name of the input): Infinity's [L, bits a token] is uniform in [0, 1), -1 forces a bit
        to one, 2 to zero; where codes are chosen it is [L, 1], and -1 - i forces code i.
        `wait`: yield every step when it is done; else the device is given all of them, and all are yielded then.

        Raises:
            NumericsError: a scale gave numbers that are not finite; names scale and layer.
        """
        self._reset(settings)
        given: list[tuple[PreparedStep, Any, Any]] = []
        for step in self._steps:
            self._draw_noise(step.calls, noise)
            start = self.device.record_event()
            step.run()
            given.append((step, start, self.device.record_event()))
            if wait:
                yield self._finished(*given.pop(), noise, settings)
        for step, start, end in given:
            yield self._finished(step, start, end, noise, settings)

    def _finished(
        self, step: PreparedStep, start: Any, end: Any, noise: Noise, settings: SamplingSettings
    ) -> tuple[StepCalls, float]:
        logits = self.read(step.calls.sampling_head, "logits")  # waits
        if not np.isfinite(logits).all():
            raise _not_finite(self._first_bad_launch(noise, settings) or _scale(step.calls))
        return step.calls, self.device.elapsed_ms(start, end)

    def timed_launches(
        self, noise: Noise, settings: SamplingSettings, text: TextInput | None = None
    ) -> Iterator[tuple[StepCalls | None, EngineCall, float]]:
        """Draw an image launch by launch, to see where time goes: the step (None before and behind the scales), the
        call, and its milliseconds on the device. Recorded launches are not used.

        `text`: encoded first, as one launch whatever it takes; else the image is of the text last given.
        """
        if text is not None:
            yield from self._timed_encoder(text)
        yield from self._timed(None, self._condition_calls, self._condition_launches)
        self._reset(settings)
        for step in self._steps:
            self._draw_noise(step.calls, noise)
            yield from self._timed(step.calls, step.calls.calls, step.launches)
        yield from self._timed(None, self.layout.decode, self._decode_launches)

    def _timed_encoder(self, text: TextInput) -> Iterator[tuple[None, EngineCall, float]]:
        start = self.device.record_event()
        counted = self._encode_texts(text)
        end = self.device.record_event()
        self._write_mask(counted)
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

    def _draw_noise(self, calls: StepCalls, noise: Noise) -> None:
        for name, view in calls.drawn.items():
            self._memory.write(self.layout, view, draw(noise, calls.step, view.shape, name))

    def _reset(self, settings: SamplingSettings) -> None:
        first = self.layout.steps[0].sampling_head
        self._write(first, "summed", 0.0)
        for name, value in settings.scalars.items():
            if name in self._scalars:
                self._memory.write(self.layout, self._scalars[name], np.asarray(value))

    @cached_property
    def _scalars(self) -> dict[str, View]:
        """Where settings go, by name: one place for all scales."""
        bound = {n: view for step in self.layout.steps for call in step.calls for n, view in call.tensors.items()}
        return {name: view for name in SCALARS if isinstance(view := bound.get(name), View)}

    def _first_bad_launch(self, noise: Noise, settings: SamplingSettings) -> str | None:
        """Draw once more and look at what every launch writes: later launches overwrite where it began."""
        if not self._writes_finite(self.layout.text_encoder, self.layout.uncond_encoder):
            return "the text features"
        for call, launch in zip(self._condition_calls, self._condition_launches, strict=True):
            launch()
            if not self._writes_finite(call):
                return "the condition" if call.layer is None else f"the condition of layer {call.layer}"
        self._reset(settings)
        for step in self._steps:
            self._draw_noise(step.calls, noise)
            for call, launch in zip(step.calls.calls, step.launches, strict=True):
                launch()
                if call is step.calls.sampling_head and not np.isfinite(self.read(call, "logits")).all():
                    return f"{_scale(step.calls)}, the head"
                if not self._writes_finite(call):
                    return f"{_scale(step.calls)}, {_part_of_scale(step.calls, call)}"
        return None

    def _writes_finite(self, *calls: EngineCall | None) -> bool:
        return all(
            all_finite(output.dtype, self.read(call, output.name))
            for call in calls
            if call is not None
            for output in self.manifest.engines[call.engine].outputs
        )

    def decode(self) -> NDArray[np.float32]:
        """The summed codes as an image [3, H, W] in [-1, 1]; on the CPU a view that the next image overwrites.

        Raises:
            NumericsError: the image decoder gave numbers that are not finite.
        """
        self._decode()
        assert self.layout.image is not None
        found = self.read_view(self.layout.image)
        image: NDArray[np.float32] = found[0] if self.manifest.tiles is None else found.swapaxes(0, 1)
        if not np.isfinite(image).all():
            raise _not_finite("the image decoder")
        return image

    def summed_codes(self, calls: StepCalls) -> NDArray[np.float32]:
        """Running sum [bits, h, w] after a scale."""
        summed: NDArray[np.float32] = self.read_view(calls.summed)[0]
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


def _nothing() -> None:
    raise InternalError("this launch was not planned")
