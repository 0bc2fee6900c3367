"""Images that clients send: measured before they are decoded, and read one at a time."""

from __future__ import annotations

import io
import threading

from PIL import Image

from ...runtime.images.formats import FORMATS, READ_ERRORS, read_trouble
from .answers import invalid

MOST_PIXELS = 1 << 25  # of one image: 5792x5792
_DECODING = threading.Lock()  # one at a time: decoded images are large


def decoded(data: bytes, field: str) -> Image.Image:
    """A PNG, JPEG or WebP file as an image.

    Raises:
        ApiError: another kind of file, a damaged one, or more pixels than are decoded.
    """
    formats = ", ".join(found.name for found in FORMATS)
    with _DECODING:
        try:
            image = Image.open(io.BytesIO(data), formats=[found.pillow for found in FORMATS])
            if image.width * image.height > MOST_PIXELS:
                raise invalid(
                    f"the {field} is {image.width}x{image.height}",
                    field,
                    f"at most {MOST_PIXELS} pixels",
                    "send it smaller",
                )
            image.load()
        except READ_ERRORS as error:
            problem = f"the {field} cannot be read: {read_trouble(error)}"
            raise invalid(problem, field, f"a whole file: {formats}") from None
        return image


def only(data: list[bytes], field: str) -> bytes:
    """The file of a field that takes one.

    Raises:
        ApiError: several were sent.
    """
    if len(data) > 1:
        raise invalid(f"{len(data)} files as {field}", field, "one", "send a request for each")
    return data[0]
