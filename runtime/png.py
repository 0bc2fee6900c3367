"""PNG files that say how they were made: prompt, seed, settings and bundle digest travel as text chunks.

Knows files and images; nothing of models or bundles.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin

from ..errors import InputError

MAX_SLUG = 60  # characters of the prompt in a file name


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a PNG with text chunks: under a temporary name, then renamed, so that no half file is ever seen.

    Makes the folder if need be.

    Raises:
        InputError: the folder cannot be written.
    """
    chunks = PngImagePlugin.PngInfo()
    for key, text in metadata.items():
        chunks.add_itxt(key, text)  # UTF-8: prompts hold any script
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".fastvar-", suffix=".png", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                image.save(file, "PNG", pnginfo=chunks)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def read_metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG.

    Raises:
        InputError: no readable PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text chunks may follow the pixels
            return {str(key): str(text) for key, text in image.info.items() if isinstance(text, str)}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}", expected="a PNG file") from error


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower-case ASCII words joined by hyphens."""
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return "-".join(words)[:MAX_SLUG].rstrip("-") or "image"


def free_path(path: Path) -> Path:
    """The path itself, or with -2, -3 and so on before the suffix where that is taken."""
    candidate, number = path, 2
    while os.path.lexists(candidate):
        candidate, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return candidate


def check_writable(folder: Path) -> None:
    """Try, with a temporary file, whether files can be written there; a folder yet to be made is tried in its parent.

    Raises:
        InputError: nothing can be written there.
    """
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    with _writing(folder), tempfile.TemporaryFile(dir=existing):
        pass


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}", fix="choose another place with --out, or free some space"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
