"""The index of a folder: a row for every image that was asked for, made anew from the files that are there."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..core.files import write_whole
from ..core.platform import import_extra
from ..errors import InputError
from ..runtime.images.formats import READ_ERRORS
from .folder import IMAGES, BulkFolder
from .items import BadItem, Item

INDEX = "index.parquet"


def write_index(folder: BulkFolder, items: Sequence[Item | BadItem], digest: str) -> Path:
    """Write index.parquet. An image counts where its file is there, an error where it is written down.

    Raises:
        BackendError: pyarrow is missing.
        OSError: it cannot be written.
    """
    arrow, parquet = import_extra("pyarrow", "batch"), import_extra("pyarrow.parquet", "batch")
    text, whole = arrow.string(), arrow.int64()
    schema = arrow.schema(
        [
            ("row", whole),
            ("place", whole),
            ("id", text),
            ("state", text),
            ("file", text),
            ("key", text),
            ("kind", text),
            ("subject", text),
            ("seed", whole),
            ("settings", text),
            ("bundle", text),
            ("width", whole),
            ("height", whole),
            ("error", text),
        ]
    )
    table = arrow.Table.from_pylist(list(_entries(folder, items, digest)), schema=schema)
    data = io.BytesIO()
    parquet.write_table(table, data)
    path = folder.path / INDEX
    write_whole(path, data.getvalue(), sync=True)
    return path


def _entries(folder: BulkFolder, items: Sequence[Item | BadItem], digest: str) -> Iterator[dict[str, Any]]:
    done, failed = folder.done(), folder.failed()
    for item in items:
        entry: dict[str, Any] = {"row": item.row, "id": item.name, "key": item.key, "bundle": digest}
        if isinstance(item, Item):
            asked = item.settings | (item.editing or {})
            entry |= {"place": item.place, "kind": item.kind, "subject": str(item.subject), "seed": item.seed}
            entry |= {"settings": json.dumps(asked, sort_keys=True)}
        wrong = item.error if isinstance(item, BadItem) else failed.get(item.key)
        size = _size(folder.image(item.key)) if item.key in done else None
        if size is not None:
            entry |= {"state": "drawn", "file": f"{IMAGES}/{item.key}{folder.suffix}"}
            entry |= {"width": size[0], "height": size[1]}
        elif wrong is not None:
            parts = {name: str(wrong.get(name, "")) for name in ("problem", "expected", "fix")}
            entry |= {"state": "failed", "error": str(InputError(**parts))}
        else:
            entry |= {"state": "missing"}
        yield entry


def _size(file: Path) -> tuple[int, int] | None:
    """(width, height) by the file's head; None of what is no image."""
    try:
        with Image.open(file) as image:
            return image.size
    except READ_ERRORS:
        return None
