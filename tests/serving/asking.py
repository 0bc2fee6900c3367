"""What tests ask of a server, and how they read its answers."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
PROMPT = "a red circle"


def image_of(data: str) -> Image.Image:
    """The image of a b64_json."""
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


def pixels(image: Any) -> np.ndarray:
    """Of an image, or of a b64_json."""
    return np.asarray(image_of(image) if isinstance(image, str) else image)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each with its name under "event"."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            assert [line.partition(": ")[0] for line in lines] == ["event", "data"], lines
            found.append({"event": lines[0][7:], **json.loads(lines[1][6:])})
    return found


def comments(text: str) -> list[str]:
    return [line[2:] for line in text.split("\n") if line.startswith(":")]
