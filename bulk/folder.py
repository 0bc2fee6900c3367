"""The folder that images go to. Its files alone say what has been done: a run reads them, whatever ended the last one.

`images/KEY.png` is an image, whole; `errors/KEY.json` says why there is none; `attempts/KEY` counts how often a process
began an image without ending it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.files import TEMPORARY, write_whole
from ..errors import InputError
from ..runtime.images.formats import format_named

IMAGES, ERRORS, ATTEMPTS = "images", "errors", "attempts"
MOST_ATTEMPTS = 3
BAD_ROW = "row-"  # how keys of rows begin that could not be read


@dataclass(frozen=True)
class BulkFolder:
    """A folder of images of one format. suffix: ".png"."""

    path: Path
    suffix: str

    @classmethod
    def of(cls, path: str | Path, image_format: str) -> BulkFolder:
        """The folder of images of a format, by its name."""
        return cls(Path(path).absolute(), format_named(image_format).suffixes[0])

    def make(self) -> None:
        """Make it, and remove what killed processes left half written.

        Raises:
            InputError: it cannot be written.
        """
        try:
            for name in (IMAGES, ERRORS, ATTEMPTS):
                (self.path / name).mkdir(parents=True, exist_ok=True)
                for file in (self.path / name).glob(f"{TEMPORARY}*"):
                    file.unlink(missing_ok=True)
        except OSError as error:
            fix = "choose another folder with --out"
            raise InputError(f"cannot write {self.path}: {error.strerror}", fix=fix) from error

    def image(self, key: str) -> Path:
        return self.path / IMAGES / f"{key}{self.suffix}"

    def has(self, key: str) -> bool:
        return self.image(key).exists()

    def done(self) -> set[str]:
        """Keys of all images that are there."""
        return {file.stem for file in (self.path / IMAGES).iterdir() if file.suffix == self.suffix}

    def failed(self) -> dict[str, dict[str, Any]]:
        """What is wrong, by key."""
        found = {}
        for file in (self.path / ERRORS).glob("*.json"):
            with suppress(OSError, ValueError):
                found[file.stem] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def save(self, key: str, data: bytes) -> None:
        """An image, brought to the disk. What was wrong with it before is forgotten.

        Raises:
            OSError: it cannot be written.
        """
        write_whole(self.image(key), data, sync=True)
        (self.path / ERRORS / f"{key}.json").unlink(missing_ok=True)
        self.ended([key])

    def fail(self, key: str, row: int, name: str, error: Mapping[str, str]) -> None:
        """Say why there is no image."""
        entry = {"row": row, "id": name, **error}
        write_whole(self.path / ERRORS / f"{key}.json", json.dumps(entry, indent=1).encode(), sync=True)

    # Attempts: a process that dies leaves its mark, whatever kills it.

    def attempts(self, key: str) -> int:
        """How often a process began the image, and died."""
        try:
            return (self.path / ATTEMPTS / key).stat().st_size
        except OSError:
            return 0

    def begun(self, keys: Sequence[str]) -> None:
        """Mark images as begun: a byte each time."""
        for key in keys:
            with (self.path / ATTEMPTS / key).open("ab") as handle:
                handle.write(b".")

    def ended(self, keys: Sequence[str]) -> None:
        """Whatever came of them, the process lives."""
        for key in keys:
            (self.path / ATTEMPTS / key).unlink(missing_ok=True)

    def forget_errors(self, *, all_of_them: bool) -> None:
        """Those of rows that could not be read: the table may have been mended. Or all, and every attempt with them."""
        stale = list((self.path / ERRORS).glob("*.json" if all_of_them else f"{BAD_ROW}*.json"))
        stale += list((self.path / ATTEMPTS).iterdir()) if all_of_them else []
        for file in stale:
            file.unlink(missing_ok=True)
