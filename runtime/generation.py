"""One image at a time: launches prepared once on static memory, then the loop over scales as a generator.

Knows backends only through `Engine.prepare`, and memory only through the arena.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..engines.base import Engine, Launch, TensorRef
from ..engines.manifest import Manifest
from ..errors import InputError, InternalError, NumericsError
from .layout import Binding, EngineCall, StepCalls, View, WeightView, lay_out
from .memory import HostArena
from .prompt import TokenizedPrompt

Noise = Callable[[int, tuple[int, ...]], NDArray[np.float32]]


class Weights(Protocol):
    """The memory-mapped weight file."""

    def __getitem__(self, name: str) -> NDArray[Any]: ...

    def ref(self, name: str) -> TensorRef: ...


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of one image, validated."""

    guidance_scale: float
    tau: float
    top_p: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.guidance_scale) and 0 <= self.guidance_scale <= 100):
            raise InputError(f"guidance_scale {self.guidance_scale} is out of range", expected="a number from 0 to 100")
        if not (np.isfinite(self.tau) and 0 < self.tau <= 100):
            raise InputError(f"tau {self.tau} is out of range", expected="a temperature above 0, at most 100")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is out of range", expected="a share above 0, at most 1")

    @property
    def rows(self) -> int:
        """Guidance rows to run: without guidance the unconditional row is not computed at all."""
        return 1 if self.guidance_scale == 1 else 2


@dataclass(frozen=True)
class TextInput:
    """Tokenized prompts of one image. Without a negative prompt the learned unconditional text stands in."""

    prompt: TokenizedPrompt
    negative: TokenizedPrompt | None = None


@dataclass
class PreparedStep:
    calls: StepCalls
    layers: list[Launch]
    bridge: Launch


class Workspace:
    """Static memory and prepared launches for one image with a given number of guidance rows."""

    def __init__(self, manifest: Manifest, engines: Mapping[str, Engine], weights: Weights, rows: int) -> None:
        self.manifest, self.layout = manifest, lay_out(manifest, rows)
        self.arena = HostArena(self.layout)
        self._engines, self._weights = engines, weights
        layout = self.layout
        self._text_encoder = self._prepare(layout.text_encoder)
        self._uncond_encoder = self._prepare(layout.uncond_encoder)
        self._condition = [self._prepare(layout.condition), *(self._prepare(call) for call in layout.text_kv)]
        self._steps = [
            PreparedStep(calls, [self._prepare(c) for c in calls.layers], self._prepare(calls.bridge))
            for calls in layout.steps
        ]
        self._decode = self._prepare(layout.decoder)

    def _prepare(self, call: EngineCall | None) -> Launch:
        if call is None:
            return _nothing
        tensors = {name: self._ref(binding) for name, binding in call.tensors.items()}
        return self._engines[call.engine].prepare(tensors)

    def _ref(self, binding: Binding) -> TensorRef:
        if isinstance(binding, WeightView):
            return self._weights.ref(binding.name)
        return self.arena.ref(binding)

    def read(self, call: EngineCall, name: str) -> NDArray[Any]:
        """The tensor an engine call is bound to, as it lies in the arena."""
        view = call.tensors[name]
        if not isinstance(view, View):
            raise InternalError(f"{call.engine}: {name} is a weight")
        return self.arena.array(view)

    def encode_text(self, text: TextInput) -> None:
        """Run the text encoder for the prompt, and for the negative prompt or with the learned rows."""
        self._encode(text.prompt, self.layout.text_encoder, self._text_encoder)
        if self.layout.rows == 1:
            self.set_features(self._features("cond"), None, (text.prompt.length,))
        elif text.negative is None:
            # The learned text is cut to the prompt's length, so its effect depends on that length (upstream).
            learned = self._weights["transformer.cfg_uncond"][: self.manifest.text_length]
            self.set_features(self._features("cond"), learned, (text.prompt.length,) * 2)
        else:
            self._encode(text.negative, self.layout.uncond_encoder, self._uncond_encoder)
            lengths = (text.prompt.length, text.negative.length)
            self.set_features(self._features("cond"), self._features("uncond"), lengths)

    def _encode(self, prompt: TokenizedPrompt, call: EngineCall | None, launch: Launch) -> None:
        if call is None:
            raise InternalError("the bundle has no text encoder; give text features instead")
        self.read(call, "ids")[:] = prompt.ids
        self.read(call, "attention_mask")[:] = prompt.mask
        launch()

    def _features(self, name: str) -> NDArray[Any]:
        assert self.layout.condition is not None
        return self.read(self.layout.condition, name)

    def set_features(self, cond: NDArray[Any], uncond: NDArray[Any] | None, lengths: tuple[int, ...]) -> None:
        """Text features [<= T, Ct] of each guidance row and how many of them count; then condition and text keys."""
        mask = self._features("mask")
        mask[:] = np.arange(mask.shape[1]) < np.array(lengths)[:, None]
        for name, features, length in zip(("cond", "uncond"), (cond, uncond), lengths, strict=False):
            if features is None:
                continue
            target = self._features(name)
            target[:length] = features[:length]
            target[length:] = 0  # padding must be finite: it is masked, not left out
        for launch in self._condition:
            launch()

    def run_scales(self, noise: Noise, settings: SamplingSettings) -> Iterator[tuple[StepCalls, float]]:
        """Run scale after scale; yields each step with its wall milliseconds.

        noise(scale index, shape [L, bits a token]): uniform in [0, 1); -1 forces a bit to one, 2 to zero.

        Raises:
            NumericsError: a scale gave numbers that are not finite; names scale and layer.
        """
        self._reset(settings)
        for step in self._steps:
            start = time.perf_counter()
            self._draw_noise(step.calls, noise)
            for launch in step.layers:
                launch()
            step.bridge()
            if not np.isfinite(self.read(step.calls.bridge, "logits")).all():
                raise _not_finite(self._first_bad_launch(noise, settings) or _scale(step.calls))
            yield step.calls, (time.perf_counter() - start) * 1e3

    def _draw_noise(self, calls: StepCalls, noise: Noise) -> None:
        self.arena.array(calls.noise)[:] = noise(calls.step.index, calls.noise.shape)

    def _reset(self, settings: SamplingSettings) -> None:
        first = self.layout.steps[0].bridge
        self.read(first, "summed")[:] = 0
        self.read(first, "tau")[:] = settings.tau
        self.read(first, "cut")[:] = 1 - settings.top_p
        if self.layout.rows == 2:
            self.read(first, "guidance")[:] = settings.guidance_scale

    def _first_bad_launch(self, noise: Noise, settings: SamplingSettings) -> str | None:
        """Draw once more and look at what every launch writes: later launches overwrite where it began."""
        assert self.layout.condition is not None
        condition = (self.layout.condition, *self.layout.text_kv)
        if not self._writes_finite(self.layout.text_encoder, self.layout.uncond_encoder):
            return "the text features"
        for call, launch in zip(condition, self._condition, strict=True):
            launch()
            if not self._writes_finite(call):
                return "the text condition" if call.layer is None else f"the text keys of layer {call.layer}"
        self._reset(settings)
        for step in self._steps:
            self._draw_noise(step.calls, noise)
            for call, launch in zip(step.calls.layers, step.layers, strict=True):
                launch()
                if not self._writes_finite(call):
                    return f"{_scale(step.calls)}, layer {call.layer}"
            step.bridge()
            if not np.isfinite(self.read(step.calls.bridge, "logits")).all():
                return f"{_scale(step.calls)}, the head"
            if not self._writes_finite(step.calls.bridge):
                return f"{_scale(step.calls)}, the tokens of the next scale"
        return None

    def _writes_finite(self, *calls: EngineCall | None) -> bool:
        return all(
            np.isfinite(self.read(call, output.name)).all()
            for call in calls
            if call is not None
            for output in self.manifest.engines[call.engine].outputs
        )

    def decode(self) -> NDArray[np.float32]:
        """The summed codes as an image [3, H, W] in [-1, 1]; a view that the next image overwrites.

        Raises:
            NumericsError: the image decoder gave numbers that are not finite.
        """
        self._decode()
        assert self.layout.image is not None
        image: NDArray[np.float32] = self.arena.array(self.layout.image)[0]
        if not np.isfinite(image).all():
            raise _not_finite("the image decoder")
        return image

    def summed_codes(self, calls: StepCalls) -> NDArray[np.float32]:
        """Running sum [bits, h, w] after a scale."""
        summed: NDArray[np.float32] = self.arena.array(calls.summed)[0]
        return summed


def _scale(calls: StepCalls) -> str:
    h, w = calls.step.size
    return f"scale {calls.step.index} ({h}x{w})"


def _not_finite(where: str) -> NumericsError:
    return NumericsError(
        f"{where}: numbers that are not finite",
        expected="finite activations",
        fix="check the checkpoint; in 16-bit engines prefer bfloat16 over float16",
    )


def _nothing() -> None:
    raise InternalError("this launch was not planned")


def with_overrides(defaults: SamplingSettings, **values: float | None) -> SamplingSettings:
    """Settings with those replaced that were given."""
    return replace(defaults, **{name: value for name, value in values.items() if value is not None})
