"""PNG files that say how they were made, and the names that images are saved under."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from ...errors import InputError
from .file_names import free_path, slug
from .files import check_writable, save_image
from .formats import PNG, read_metadata

__all__ = ["check_writable", "free_path", "read_metadata", "save_png", "slug"]


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str]) -> Path:
    """Write a PNG with text chunks; see `save_image`.

    Returns:
        Where it is: `path`, or with -2, -3 and so on before the suffix where that was taken.

    Raises:
        InputError: the path has another suffix, or cannot be written.
    """
    if path.suffix.lower() not in PNG.suffixes:
        raise InputError(f"cannot write {path}", expected="a .png file")
    return save_image(image, path, metadata)
