"""Images that rows ask for, each under a key that says all that decides it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.files import digest_of_file
from ..errors import FastvarError, InputError
from .folder import BAD_ROW
from .rows import BadRow, Row

KEY_DIGITS = 32


@dataclass(frozen=True)
class Item:
    """One image. Plain values, so that it travels as JSON. place: among the images of its row."""

    key: str
    row: int
    place: int
    name: str
    kind: str
    subject: str | int
    seed: int
    settings: dict[str, Any]  # by the names of SamplingParams, without seed and num_images
    image: str | None = None
    mask: str | None = None
    editing: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BadItem:
    """A row that gives no image."""

    key: str
    row: int
    name: str
    error: dict[str, str]  # problem, expected, fix


def items_of(rows: Iterable[Row | BadRow], digest: str) -> Iterator[Item | BadItem]:
    """Every image of every row, in order. digest: the bundle's."""
    for row in rows:
        if isinstance(row, BadRow):
            yield _bad(row, row.error)
            continue
        try:
            given = {name: _digest(path) for name, path in (("image", row.image), ("mask", row.mask)) if path}
        except InputError as error:
            yield _bad(row, error)
            continue
        settings = {name: value for name, value in asdict(row.params).items() if value is not None}
        first, count = settings.pop("seed"), settings.pop("num_images")
        for place in range(count):
            what = {"bundle": digest, row.kind: row.subject, "seed": first + place, **settings, **given, **row.editing}
            yield Item(
                _key(what),
                row.number,
                place,
                row.name,
                row.kind,
                row.subject,
                first + place,
                settings,
                str(row.image) if row.image else None,
                str(row.mask) if row.mask else None,
                row.editing or None,
            )


def _bad(row: Row | BadRow, error: FastvarError) -> BadItem:
    return BadItem(f"{BAD_ROW}{row.number:08d}", row.number, row.name, error.parts)


def _key(what: dict[str, Any]) -> str:
    text = json.dumps(what, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return digest_of_file(handle)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", expected="an image file beside the table") from error
