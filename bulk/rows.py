"""Rows of a table: what each asks for, or why it cannot be understood. JSON Lines, CSV and Parquet."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..core.arguments import shown
from ..core.platform import import_extra
from ..errors import FastvarError, InputError
from ..runtime.requests.params import ALIASES, SamplingParams

SUBJECTS = ("prompt", "class_label")
FILES = ("image", "mask")
EDITING = ("keep_scales", "fit")
SAMPLING = (*(entry.name for entry in fields(SamplingParams)), *ALIASES)
COLUMNS = ("id", *SUBJECTS, *FILES, *EDITING, *SAMPLING)
TEXTS = ("id", *SUBJECTS, *FILES, "fit", "negative_prompt")
WHOLE = ("seed", "num_images", "top_k", "keep_scales")
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """What one row asks for. `params` has a seed: one that is not given follows from the row, so that a second run asks
    for the same images.
    """

    number: int  # from 1
    name: str  # its id; empty where it has none
    kind: str  # "prompt" or "class_label"
    subject: str | int
    params: SamplingParams
    image: Path | None = None
    mask: Path | None = None
    editing: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be understood."""

    number: int
    name: str
    error: FastvarError


def read_rows(path: Path, given: SamplingParams | None = None) -> Iterator[Row | BadRow]:
    """The rows of a table; files that they name lie beside it. `given` is what they leave unsaid.

    Raises:
        InputError: no table, or a column that is not known.
        BackendError: pyarrow is missing, and the table is a Parquet file.
    """
    for number, values in enumerate(_values(path), start=1):
        name = ""
        try:
            if isinstance(values, InputError):
                raise values
            name = str(values.get("id") or "")
            yield _row(number, values, path.parent, given or SamplingParams())
        except FastvarError as error:
            yield BadRow(number, name, error)


def _values(path: Path) -> Iterator[dict[str, Any] | InputError]:
    """Columns and values of every row, None left out."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is no table that is read", expected=f"a {', '.join(SUFFIXES)} file")
    try:
        if suffix == ".csv":
            yield from _of_csv(path)
        elif suffix == ".parquet":
            yield from _of_parquet(path)
        else:
            yield from _of_json(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}", expected="a table in UTF-8") from error


def _of_json(path: Path) -> Iterator[dict[str, Any] | InputError]:
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield _object(line)


def _object(line: str) -> dict[str, Any] | InputError:
    expected = 'an object a line, as {"prompt": "a red circle", "seed": 7}'
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON: {error}", expected=expected)
    if not isinstance(found, dict):
        return InputError(f"{shown(found)} is no object", expected=expected)
    return {name: value for name, value in found.items() if value is not None}


def _of_csv(path: Path) -> Iterator[dict[str, Any] | InputError]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        _check_columns(path, reader.fieldnames or ())
        for values in reader:
            if None in values or None in values.values():
                yield InputError("more or fewer values than columns", fix="put text with commas in quotes")
            else:
                yield {name: text for name, text in values.items() if text != ""}


def _of_parquet(path: Path) -> Iterator[dict[str, Any]]:
    parquet = import_extra("pyarrow.parquet", "batch")
    data = io.BytesIO(path.read_bytes())
    try:
        table = parquet.read_table(data)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", expected="a Parquet file") from error
    _check_columns(path, table.column_names)
    for values in table.to_pylist():
        yield {name: value for name, value in values.items() if value is not None}


def _check_columns(path: Path, names: Any) -> None:
    if unknown := [name for name in names if name not in COLUMNS]:
        raise InputError(
            f"{path} has columns that are not known: {', '.join(map(repr, unknown))}",
            expected=f"some of {', '.join(COLUMNS)}",
            fix="rename them, or leave them out",
        )


def _row(number: int, values: Mapping[str, Any], folder: Path, given: SamplingParams) -> Row:
    if unknown := [name for name in values if name not in COLUMNS]:
        raise InputError(f"unknown field {shown(unknown[0])}", expected=f"some of {', '.join(COLUMNS)}")
    values = {name: _plain(name, value) for name, value in values.items()}
    kinds = [name for name in SUBJECTS if name in values]
    if len(kinds) != 1:
        raise InputError("both prompt and class_label" if kinds else "no prompt", expected="prompt or class_label")
    if "mask" in values and "image" not in values:
        raise InputError("a mask without an image", fix="name the image too, or leave the mask away")
    editing = {name: values[name] for name in EDITING if name in values}
    if editing and "image" not in values:
        raise InputError(f"{', '.join(editing)} without an image", fix="leave it away")
    subject = values[kinds[0]]
    params = given.changed(**{name: values[name] for name in SAMPLING if name in values})
    if params.seed is None:
        params = params.changed(seed=_seed(number, subject))
    files = {name: folder / values[name] for name in FILES if name in values}
    return Row(number, values.get("id", ""), kinds[0], subject, params, editing=editing, **files)


def _plain(name: str, value: Any) -> Any:
    """A value as the pipeline takes it: tables of text hold numbers as text."""
    if name in TEXTS:
        if name in ("class_label", "id") and isinstance(value, int) and not isinstance(value, bool):
            return value if name == "class_label" else str(value)
        if not isinstance(value, str):
            raise InputError(f"{name} {shown(value)} is a {type(value).__name__}", expected="text")
        return value
    if not isinstance(value, str):
        return value
    try:
        return int(value) if name in WHOLE else float(value)
    except ValueError:
        expected = "a whole number" if name in WHOLE else "a number"
        raise InputError(f"{name} {shown(value)} not understood", expected=expected) from None


def _seed(number: int, subject: str | int) -> int:
    """Of a row that has none: the same in every run, another in every row."""
    text = f"{number}\0{subject}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "little")
