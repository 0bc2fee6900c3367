"""Where drawn images go: each is on the disk, or in the pipe, before the next one is drawn."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import InputError
from .interruption import signals_deferred
from .streams import tell

if TYPE_CHECKING:
    from ..runtime.images.formats import ImageFormat
    from ..runtime.output import GeneratedImage

STDOUT = Path("-")
# A path that ends so means a file, though it may be none that is written.
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
SETTINGS_BYTES = 4096  # more than settings, seed and digest take in a file


@dataclass(frozen=True)
class Destination:
    """A file, a folder, or stdout, and the format that images are stored in there."""

    out: Path
    is_file: bool
    format: ImageFormat
    quality: int | None
    pipe: BinaryIO | None = None  # stdout, where images go there

    def saver(self, digest: str, prefixes: Sequence[str] = ()) -> Callable[[GeneratedImage], None]:
        """A callback that saves an image of the bundle with that digest, and says where. In a folder its name begins
        with the prefix of its place in the call, if there are any.

        A signal that arrives meanwhile waits for it: what was drawn is kept.
        """

        def save(drawn: GeneratedImage) -> None:
            # A pipe may be full and nobody read it: there a signal need not wait.
            with signals_deferred() if self.pipe is None else contextlib.nullcontext():
                where = self._save(drawn, digest, prefixes[drawn.index] if prefixes else "")
                count = drawn.timings.images
                together = f" for {count} images" if count > 1 else ""
                tell(f"wrote {where} (seed {drawn.seed}, {drawn.timings.total_ms / 1e3:.2f} s{together})")

        return save

    def _save(self, drawn: GeneratedImage, digest: str, prefix: str) -> Path | str:
        from ..runtime.images.file_names import slug
        from ..runtime.images.files import save_image

        metadata = drawn.metadata(digest)
        if self.pipe is not None:
            _write(self.pipe, self.format.encode(drawn.image, metadata, self.quality))
            return "the image to stdout"
        name = f"{prefix}{slug(drawn.prompt)}-{drawn.seed}{self.format.suffixes[0]}"
        return save_image(drawn.image, self.out if self.is_file else self.out / name, metadata, self.quality)


@contextlib.contextmanager
def destination(
    out: Path,
    format_name: str | None,
    quality: int | None,
    prompts: Sequence[str],
    images: int,
    negative_prompts: Sequence[str | None] = (),
) -> Iterator[Destination]:
    """Where the images of a command go, `images` together; checked before anything is loaded.

    While images go to stdout, all else that is printed goes to stderr.

    Raises:
        InputError: nothing can be written there, one file for several images, or a format that does not fit.
    """
    from ..runtime.images.files import check_writable

    is_file = out != STDOUT and _names_file(out)
    if images > 1 and (is_file or out == STDOUT):
        raise InputError(f"--out names one file for {images} images", fix="give a folder")
    chosen = _format(out if is_file else None, format_name)
    longest = max((text or "" for text in negative_prompts), key=len, default="")
    settings = json.dumps({"negative_prompt": longest}) + " " * SETTINGS_BYTES
    for prompt in prompts:
        chosen.check({"prompt": prompt, "settings": settings}, quality)
    if out == STDOUT:
        with _stdout_for_bytes() as pipe:
            yield Destination(out, is_file, chosen, quality, pipe)
        return
    check_writable(out.parent if is_file else out)
    yield Destination(out, is_file, chosen, quality)


def _names_file(out: Path) -> bool:
    return not out.is_dir() and out.suffix.lower() in IMAGE_SUFFIXES


def _format(file: Path | None, name: str | None) -> ImageFormat:
    from ..runtime.images.formats import PNG, format_named, format_of

    wanted = None if name is None else format_named(name)
    if file is None:
        return wanted or PNG
    found = format_of(file)
    if wanted not in (None, found):
        raise InputError(f"--format {name}, but --out names a {found.name} file", fix="leave --format away")
    return found


@contextlib.contextmanager
def _stdout_for_bytes() -> Iterator[BinaryIO]:
    """stdout, for images alone: what else is printed, by libraries too, goes to stderr meanwhile."""
    if sys.stdout is None:
        raise InputError("stdout is closed", expected="a pipe or a file to write the image to")
    if os.isatty(1):
        raise InputError("an image on a terminal is no use", fix="pipe it, or name a file: --out image.png")
    sys.stdout.flush()
    pipe = os.fdopen(os.dup(1), "wb")
    try:
        with contextlib.suppress(OSError):  # stderr is closed: nobody reads it anyway
            os.dup2(2, 1)
        yield pipe
    finally:
        sys.stdout.flush()
        os.dup2(pipe.fileno(), 1)
        with contextlib.suppress(OSError):  # told when it was written
            pipe.close()


def _write(pipe: BinaryIO, data: bytes) -> None:
    try:
        pipe.write(data)
        pipe.flush()
    except OSError as error:
        raise InputError(f"cannot write the image to stdout: {error.strerror or error}") from error
