"""File names from prompts, in any script, and numbers for names that are taken."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from itertools import count
from pathlib import Path

# Of the prompt in a file name. File systems take 255 bytes; seed, number, suffix and some room follow.
MAX_CHARACTERS = 60
MAX_BYTES = 180

INVISIBLE_LETTERS = "\u115f\u1160\u3164\uffa0"  # fillers of Hangul, which Unicode counts among the letters
VARIATION_SELECTORS = ("VARIATION SELECTOR", "MONGOLIAN FREE VARIATION SELECTOR", "COMBINING GRAPHEME JOINER")
# Names that Windows keeps for devices, whatever suffix follows.
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "0123456789¹²³")}


def slug(prompt: str) -> str:
    """A prompt as part of a file name: its words, case-folded and joined by hyphens, in NFC.

    Letters and digits of every script count, with the marks that belong to them. Nothing else does: no separators of
    paths, no control characters, no marks of writing direction. A prompt without a letter or digit is "image".
    """
    kept = ""
    for character in unicodedata.normalize("NFC", prompt).casefold():
        category = unicodedata.category(character)
        is_letter = category[0] in "LN" and character not in INVISIBLE_LETTERS
        is_mark = category in ("Mn", "Mc") and not _selects_variation(character)
        if is_letter or (is_mark and kept[-1:].strip()):
            kept += character
        elif category != "Cf":  # joiners and direction marks do not part words
            kept += " "
    name = unicodedata.normalize("NFC", "-".join(kept.split()))[:MAX_CHARACTERS]
    name = name.encode()[:MAX_BYTES].decode(errors="ignore").rstrip("-") or "image"
    return f"image-{name}" if name in DEVICES else name


def numbered(path: Path) -> Iterator[Path]:
    """The path itself, then with -2, -3 and so on before the suffix."""
    yield path
    for number in count(2):
        yield path.with_stem(f"{path.stem}-{number}")


def free_path(path: Path) -> Path:
    """The first of the numbered paths that is not taken. It may be taken a moment later."""
    return next(candidate for candidate in numbered(path) if not os.path.lexists(candidate))


def _selects_variation(character: str) -> bool:
    return unicodedata.name(character, "").startswith(VARIATION_SELECTORS)
