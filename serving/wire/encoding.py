"""Images as they are sent: encoded with their origin in them, in base64; and the numbers that go with them."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from ...core.plan import GenerationPlan
from ...runtime.images.formats import PNG, ImageFormat, format_named
from ...runtime.output import GeneratedImage, ImageTimings, ScaleEvent
from ...runtime.requests.inputs import TextInput
from ...runtime.requests.passes import ImageRequest


@dataclass(frozen=True)
class Encoding:
    """How the images of a request are stored."""

    format: ImageFormat = PNG
    quality: int | None = None

    @classmethod
    def asked(cls, name: str | None, compression: int | None) -> Encoding:
        """output_format and output_compression.

        Raises:
            InputError: the format has no quality.
        """
        chosen = PNG if name is None else format_named(name)
        quality = None if compression is None else max(1, compression)
        chosen.check({}, quality)
        return cls(chosen, quality)

    def image(self, drawn: GeneratedImage, digest: str) -> str:
        """A finished image, with what it was drawn from as metadata.

        Raises:
            InputError: the format has no room for that.
        """
        return _base64(self.format.encode(drawn.image, drawn.metadata(digest), self.quality))

    def preview(self, event: ScaleEvent) -> str:
        return _base64(self.format.encode(event.preview(), {}, self.quality))


def usage(requests: list[ImageRequest], plan: GenerationPlan) -> dict[str, Any]:
    """Tokens read and drawn, as OpenAI's clients expect them: of texts, of given images, and of all scales."""
    text = kept = 0
    for request in requests:
        if isinstance(request.given, TextInput):
            negative = request.given.negative
            text += request.given.prompt.length + (negative.length if negative else 0)
        if request.edit is not None:
            kept += sum(int(tokens.sum()) for tokens in request.edit.kept.values())
    drawn = sum(step.tokens for step in plan.steps) * len(requests) - kept
    return {
        "input_tokens": text + kept,
        "input_tokens_details": {"text_tokens": text, "image_tokens": kept},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": text + kept + drawn,
    }


def milliseconds(timings: ImageTimings, queue_ms: float) -> dict[str, float]:
    """Where the time of an image went; what it shared with others of its pass is counted whole."""
    parts = {
        "queue": queue_ms,
        "text": timings.text_ms,
        "scales": timings.scales_ms,
        "decode": timings.decode_ms,
    }
    return {name: round(ms, 2) for name, ms in parts.items()}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
