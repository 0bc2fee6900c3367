"""Formats of image files, and how each carries what the image was made from.

PNG has a text chunk for every entry. JPEG and WebP have EXIF: UserComment holds all entries as one JSON object,
ImageDescription the prompt for those who look at the picture, and Software who made it.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError, features

from ...errors import InputError

# What Pillow's parsers have been seen to raise of damaged files.
READ_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, struct.error),
    Image.DecompressionBombError,
)

# Tags of EXIF.
IMAGE_DESCRIPTION, SOFTWARE, EXIF_IFD, USER_COMMENT = 0x010E, 0x0131, 0x8769, 0x9286
ASCII_CODE = b"ASCII\0\0\0"  # which characters a UserComment is made of
JPEG_EXIF_BYTES = 65_500  # of the 65,533 that a JPEG segment holds; the rest names tags and lengths
# Of zlib, runs of equal bytes alone (Z_RLE): pictures are as large as at Pillow's own level, 6, within 10 %, and take a
# quarter of the time; screenshots with text in them are larger by a quarter.
PNG_COMPRESSION = {"compress_level": 1, "compress_type": 3}
LOSSLESS = 100  # the quality from which on WebP files are lossless


@dataclass(frozen=True)
class ImageFormat:
    """A format: its name, how Pillow calls it, suffixes (the first for new files), and its quality by default."""

    name: str
    pillow: str
    suffixes: tuple[str, ...]
    quality: int | None = None  # None where every file is lossless

    def encode(self, image: Image.Image, metadata: Mapping[str, str], quality: int | None = None) -> bytes:
        """The bytes of a file.

        Args:
            image: what is stored.
            metadata: short texts by name; `read_metadata` gives them back.
            quality: 1 to 100, the format's own by default; 100 is lossless in WebP, and nearly so in JPEG.

        Raises:
            InputError: the metadata does not fit into the format, or Pillow was built without it.
        """
        self.check(metadata, quality)
        file = io.BytesIO()
        try:
            image.save(file, self.pillow, **self._options(metadata, quality or self.quality))
        except ValueError as error:
            raise InputError(f"the image cannot be stored as {self.name}: {error}", fix="choose png") from error
        return file.getvalue()

    def check(self, metadata: Mapping[str, str], quality: int | None = None) -> None:
        """Tell before an image is drawn that it could not be stored.

        Raises:
            InputError: as `encode`.
        """
        if quality is not None and self.quality is None:
            raise InputError(f"{self.name} has no quality: it is lossless", fix="leave --quality away, or choose jpeg")
        if quality is not None and not 1 <= quality <= LOSSLESS:
            raise InputError(f"quality {quality} is out of range", expected=f"a whole number from 1 to {LOSSLESS}")
        if self.name == "webp" and not features.check("webp"):
            raise InputError("Pillow was built without WebP on this machine", fix="choose png or jpeg")
        size = len(_comment(metadata)) + len(_description(metadata)) if self.name == "jpeg" else 0
        if size > JPEG_EXIF_BYTES:
            raise InputError(
                f"prompt and settings take {size} bytes in a JPEG file",
                expected=f"at most {JPEG_EXIF_BYTES}",
                fix="choose png or webp, or shorten the prompt",
            )

    def _options(self, metadata: Mapping[str, str], quality: int | None) -> dict[str, Any]:
        if self.name == "png":
            chunks = PngImagePlugin.PngInfo()
            for key, text in metadata.items():
                chunks.add_itxt(key, text)  # UTF-8: prompts hold any script
            return {"pnginfo": chunks, **PNG_COMPRESSION}
        if self.name == "jpeg":
            return {"exif": _exif(metadata), "quality": quality, "subsampling": "4:4:4"}
        return {"exif": _exif(metadata), "quality": quality, "lossless": quality == LOSSLESS}


PNG = ImageFormat("png", "PNG", (".png",))
JPEG = ImageFormat("jpeg", "JPEG", (".jpg", ".jpeg"), quality=95)
WEBP = ImageFormat("webp", "WEBP", (".webp",), quality=90)
FORMATS = (PNG, JPEG, WEBP)


def format_of(path: Path) -> ImageFormat:
    """The format that a file's suffix names.

    Raises:
        InputError: none, or another.
    """
    for found in FORMATS:
        if path.suffix.lower() in found.suffixes:
            return found
    suffixes = [suffix for found in FORMATS for suffix in found.suffixes]
    raise InputError(
        f"cannot write {path}",
        expected=f"a {', '.join(suffixes[:-1])} or {suffixes[-1]} file: these carry the metadata",
        fix="name it .png",
    )


def format_named(name: str) -> ImageFormat:
    """The format of that name.

    Raises:
        InputError: there is none.
    """
    for found in FORMATS:
        if name.lower() in (found.name, *(suffix[1:] for suffix in found.suffixes)):
            return found
    raise InputError(f"format {name!r} not understood", expected=", ".join(found.name for found in FORMATS))


def read_trouble(error: Exception) -> str:
    """One of READ_ERRORS in words. Pillow's of an unknown kind of file holds the address of an object."""
    if isinstance(error, UnidentifiedImageError):
        return "no kind of image file that is read"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def read_metadata(path: Path) -> dict[str, str]:
    """What `encode` stored with an image, by name; text chunks of any PNG, nothing of other programs' JPEG and WebP.

    Raises:
        InputError: no readable PNG, JPEG or WebP file.
    """
    try:
        with Image.open(path, formats=[found.pillow for found in FORMATS]) as image:
            image.load()  # text chunks may follow the pixels
            if image.format == PNG.pillow:
                return {str(key): str(text) for key, text in image.info.items() if isinstance(text, str)}
            return _read_comment(image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT))
    except READ_ERRORS as error:
        problem = f"{path} cannot be read: {read_trouble(error)}"
        raise InputError(problem, expected="a PNG, JPEG or WebP file") from error


def _exif(metadata: Mapping[str, str]) -> Image.Exif:
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = _description(metadata)
    exif[SOFTWARE] = f"fastvar {metadata.get('fastvar', '')}".encode().strip()
    exif[EXIF_IFD] = {USER_COMMENT: _comment(metadata)}
    return exif


def _description(metadata: Mapping[str, str]) -> bytes:
    return metadata.get("prompt", "").encode(errors="replace").replace(b"\0", b" ")  # a zero byte would end it


def _comment(metadata: Mapping[str, str]) -> bytes:
    """JSON in UTF-8 that is ASCII too, so that no reader takes it for another encoding."""
    return ASCII_CODE + json.dumps(dict(metadata), ensure_ascii=True).encode()


def _read_comment(comment: object) -> dict[str, str]:
    if not isinstance(comment, bytes) or not comment.startswith(ASCII_CODE):
        return {}
    try:
        found = json.loads(comment[len(ASCII_CODE) :].rstrip(b"\0 "))
    except (ValueError, RecursionError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
