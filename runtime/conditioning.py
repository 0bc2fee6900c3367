"""What images are drawn from, brought to the engines: texts or classes, before the first scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.tensors import Launch
from ..engines.bundle.manifest import Manifest
from ..errors import InternalError
from .memory.bound_layout import BoundLayout
from .memory.layout import EngineCall, View
from .requests.inputs import ImageInput, LabelInput, TextInput
from .requests.prompt import TokenizedPrompt

Counted = NDArray[np.bool_]  # [T]: the tokens of a text that are no padding


@dataclass(frozen=True)
class TextFeatures:
    """Features of a text [<= T, Ct] for each guidance row, and how many of them count."""

    cond: NDArray[Any]
    uncond: NDArray[Any] | None
    lengths: tuple[int, ...]


class Conditioning:
    """The launches before the first scale, for all images of a pass.

    `uncond` is the learned unconditional text [<= T, Ct], fp32, where the model has one.
    """

    def __init__(
        self,
        bound: BoundLayout,
        manifest: Manifest,
        uncond: NDArray[np.float32] | None,
        captured: Callable[[Sequence[Launch]], Launch],
    ) -> None:
        self._bound, self._manifest, self._uncond = bound, manifest, uncond
        layout, self._format = bound.layout, manifest.prompt_format
        assert layout.conditioning is not None
        self.call = layout.conditioning
        self.calls = (self.call, *layout.layer_conditioning)
        self.text_calls = tuple(call for call in (layout.text_encoder, layout.uncond_encoder) if call is not None)
        self._text_encoder = bound.prepare(layout.text_encoder)
        self._uncond_encoder = bound.prepare(layout.uncond_encoder)
        self.launches = [bound.prepare(call) for call in self.calls]
        self._run = captured(self.launches)

    def give(self, given: Sequence[ImageInput]) -> None:
        """Tell what each image is drawn from: condition, and what it gives to each layer."""
        texts = [one for one in given if isinstance(one, TextInput)]
        if texts:
            self.tell_what_counts(self.encode(texts))
        else:
            layout, none = self._bound.layout, [self._manifest.transformer.classes] * len(given)
            labels = [one.label for one in given if isinstance(one, LabelInput)]
            self._bound.write(self._bound.view(self.call, "labels"), (labels + none)[: layout.rows * layout.images])
        self._run()

    def give_features(self, features: Sequence[TextFeatures]) -> None:
        """The same from text features."""
        for image, own in enumerate(features):
            for name, found, length in zip(("cond", "uncond"), (own.cond, own.uncond), own.lengths, strict=False):
                if found is not None and name in self.call.tensors:
                    self._set_features(name, found, length, image)
        self.tell_what_counts([[self._counted(length) for length in own.lengths] for own in features])
        self._run()

    def encode(self, texts: Sequence[TextInput]) -> list[list[Counted]]:
        """Run the text encoder for every prompt, and for its negative prompt or with the learned rows.

        Gives which tokens of each guidance row count.
        """
        self._bound.memory.bring_text_encoder(self._bound.layout)
        return [self._encode_texts(image, text) for image, text in enumerate(texts)]

    def _encode_texts(self, image: int, text: TextInput) -> list[Counted]:
        layout = self._bound.layout
        counted = [self._encode(text.prompt, layout.text_encoder, self._text_encoder, "cond", image)]
        if layout.rows == 2 and self._uncond is not None and text.negative is None:
            # The learned text is cut to the prompt's length, so its effect depends on that length (upstream).
            self._set_features("uncond", self._uncond, text.prompt.length, image)
            counted *= 2
        elif text.negative is not None:
            counted.append(self._encode(text.negative, layout.uncond_encoder, self._uncond_encoder, "uncond", image))
        return counted

    def _encode(
        self, prompt: TokenizedPrompt, call: EngineCall | None, launch: Launch, name: str, image: int
    ) -> Counted:
        """Features of one text, to where the condition reads `name` of an image."""
        if call is None:
            raise InternalError("the bundle has no text encoder; give text features instead")
        bound = self._bound
        bound.write(bound.view(call, "ids"), prompt.ids)
        bound.write(bound.view(call, "attention_mask"), prompt.mask)
        launch()
        view = bound.view(call, "features")
        counted: Counted = prompt.mask[0, -view.shape[0] :].astype(bool)  # without the prefix
        if not self._format.keeps_padding:
            self._clear_padding(view, counted)
        place = self._place(name, image)
        if place != view:
            bound.copy(place, view)
        return counted

    def _place(self, name: str, image: int) -> View:
        """Where the condition reads an image's features."""
        view = self._bound.view(self.call, name)
        return view if self._bound.layout.images == 1 else view.part(image)

    def _set_features(self, name: str, features: NDArray[Any], length: int, image: int) -> None:
        view = self._place(name, image)
        padded = np.zeros(view.shape, np.float32)
        own = features if self._format.keeps_padding else features[:length]
        padded[: len(own)] = own
        self._bound.write(view, padded)

    def _clear_padding(self, view: View, counted: Counted) -> None:
        """Rows beside the text: they are masked, not left out, so they must be finite."""
        padding, row_bytes = np.flatnonzero(~counted), view.size // view.shape[0]
        if padding.size:
            start = view.start + int(padding[0]) * row_bytes
            self._bound.write(replace(view, start=start, shape=(padding.size, view.shape[1])), np.zeros(1))

    def _counted(self, length: int) -> Counted:
        """Which tokens count, where so many do."""
        tokens = np.arange(self._manifest.text_length)
        return tokens >= len(tokens) - length if self._format.pad_left else tokens < length

    def tell_what_counts(self, counted: Sequence[Sequence[Counted]]) -> None:
        """Write the mask of all rows: of every image's guidance rows the first, then the second ones."""
        view = self._bound.view(self.call, "mask")  # of the rows that are given text
        rows = [row for row_of_each in zip(*counted, strict=True) for row in row_of_each]
        self._bound.write(view, np.stack(rows[: view.shape[0]]))
