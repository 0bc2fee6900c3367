"""Previews: what is known of an image after a scale, as a picture: that scale's, however late it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING
from weakref import ref

import numpy as np
from numpy.typing import NDArray

from ..core.schedule import Size
from ..engines.bundle.weight_file import WeightFile
from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Codes = NDArray[np.float32]  # [bits, h, w], the running sum after a scale


class Colours:
    """From codes to an image of (height, width), by a linear map that was fitted when the bundle was built.

    The decoder costs far more.
    """

    def __init__(self, weights: WeightFile, size: Size) -> None:
        # Copies: a preview that somebody keeps must not keep the weight file mapped.
        self._weight, self._bias = np.array(weights["preview.weight"]), np.array(weights["preview.bias"])
        self._size = size

    def image(self, codes: Codes) -> Image:
        colour = np.tensordot(self._weight, codes, axes=1) + self._bias[:, None, None]
        return to_image(colour.clip(-1, 1)).resize(self._size[::-1])


class Preview:
    """The picture of one scale. `read` gives the codes in memory: this scale's until the next one is drawn."""

    def __init__(self, colours: Colours, read: Callable[[], Codes]) -> None:
        self._colours = colours
        self._read: Callable[[], Codes] | None = read
        self._codes: Codes | None = None
        # Two threads must not miss each other; the collector may close a generation while this thread is reading.
        self._reading = RLock()

    def keep(self) -> None:
        """Copy the codes, unless that was done."""
        with self._reading:
            if self._read is not None:
                read, self._read = self._read, None  # there is one chance, whatever becomes of it
                self._codes = np.array(read())

    def __call__(self) -> Image:
        """The picture, of the bundle's size.

        Raises:
            InputError: the codes were lost, because the drawing was interrupted just then.
        """
        self.keep()
        if self._codes is None:
            raise InputError("the preview was lost: its drawing was interrupted", fix="draw the image anew")
        return self._colours.image(self._codes)


class Previews:
    """The previews of one generation. Only who still has one when the next scale comes pays for a copy."""

    def __init__(self, colours: Colours) -> None:
        self._colours = colours
        self._last: Callable[[], Preview | None] = lambda: None

    def of(self, read: Callable[[], Codes]) -> Preview:
        """The preview of the scale that is in memory."""
        preview = Preview(self._colours, read)
        self._last = ref(preview)
        return preview

    def keep(self) -> None:
        """Before memory changes: the last preview, if anybody still has it, keeps its codes."""
        last = self._last()
        if last is not None:
            last.keep()


def to_image(pixels: NDArray[np.float32]) -> Image:
    """[3, H, W] in [-1, 1] -> a PIL image, rounded to the nearest level."""
    from PIL import Image as PilImage

    levels = np.rint((pixels + 1) * 127.5).astype(np.uint8)
    return PilImage.fromarray(np.ascontiguousarray(levels.transpose(1, 2, 0)))
