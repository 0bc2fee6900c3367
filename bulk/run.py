"""A table of rows becomes a folder of images: what is there is kept, what fails is told, what is missing is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.platform import import_extra
from ..engines.bundle.bundle import Bundle
from ..engines.cache.lock import FolderLock
from ..errors import InputError
from ..runtime.images.formats import format_named
from ..runtime.requests.params import SamplingParams
from .drawer import DRAWN, FAILED, THERE
from .folder import BulkFolder
from .index import write_index
from .items import BadItem, Item, items_of
from .processes import DrawerArguments, draw_in_processes
from .rows import read_rows

Draw = Callable[[Sequence[Item], DrawerArguments, int, Callable[[str, str], object]], None]


@dataclass(frozen=True)
class Outcome:
    """What a run came to: images drawn now, there before, and rows or images that failed."""

    drawn: int
    there: int
    failed: int
    index: Path


@dataclass(frozen=True)
class BulkRun:
    """Images of a table, drawn into a folder.

    Args:
        table: rows as `read_rows` reads them.
        bundle: a folder made by `fastvar build`.
        folder: where images, errors and the index go; what it holds of an earlier run is not drawn again.
        image_format, quality: of the files.
        workers: processes that draw, each with the whole bundle in memory.
        params: what rows leave unsaid.
        retry_errors: whether images that failed, or that processes died of, are tried again as if they were new.
        load_options: arguments of `Pipeline.load`.
    """

    table: Path
    bundle: Path
    folder: Path
    image_format: str = "png"
    quality: int | None = None
    workers: int = 1
    params: SamplingParams | None = None
    retry_errors: bool = False
    load_options: dict[str, Any] = field(default_factory=dict)

    def run(
        self,
        draw: Draw = draw_in_processes,
        *,
        started: Callable[[int, int], object] = lambda left, there: None,
        ended: Callable[[str], object] = lambda state: None,
    ) -> Outcome:
        """Draw what is left.

        Args:
            draw: how; in processes of our own by default.
            started: told how many images are left, and how many are there.
            ended: told of every image what became of it: "drawn" or "failed".

        Raises:
            InputError: no table, or nothing can be written.
            BundleError: the bundle cannot be opened, or another process draws into the folder.
            BackendError: pyarrow is missing.
        """
        import_extra("pyarrow.parquet", "batch")  # before anything is drawn
        chosen = format_named(self.image_format)
        chosen.check({}, self.quality)
        digest, most = self._bundle()
        asked = list(items_of(read_rows(self.table, self.params), digest))
        if not asked:
            raise InputError(f"{self.table} holds no rows", expected="at least one")
        target = BulkFolder.of(self.folder, chosen.name)
        target.make()
        lock = FolderLock(target.path / "run")
        lock.acquire()
        try:
            left, counts = _left(asked, target, self.retry_errors)
            started(len(left), counts[THERE])

            def report(_key: str, state: str) -> None:
                # Nobody else writes here: what is there by now was drawn by a process that died before it could say so.
                state = DRAWN if state == THERE else state
                counts[state] += 1
                ended(state)

            try:
                if left:
                    draw(left, self._arguments(digest, most, target.path, chosen.name), self.workers, report)
            finally:  # also where it is interrupted: the index says what is there
                target.make()
                index = write_index(target, asked, digest)
        finally:
            lock.release()
        return Outcome(counts[DRAWN], counts[THERE], counts[FAILED], index)

    def _bundle(self) -> tuple[str, int]:
        """The bundle's digest, and images of its largest pass; its weights need not stay mapped here."""
        names = ("trust_remote_code", "require_signature")
        given = {name: self.load_options[name] for name in names if name in self.load_options}
        found = Bundle.open(self.bundle.absolute(), **given)
        return found.digest, max(engines.images for engines in found.manifest.sets)

    def _arguments(self, digest: str, most: int, folder: Path, image_format: str) -> DrawerArguments:
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in self.load_options.items()}
        bundle = str(self.bundle.absolute())
        return DrawerArguments(bundle, digest, most, str(folder), image_format, self.quality, plain)


def _left(asked: Sequence[Item | BadItem], target: BulkFolder, retry_errors: bool) -> tuple[list[Item], dict[str, int]]:
    """What is to be drawn, each once, and how many images are there or cannot be drawn; writes down why not."""
    target.forget_errors(all_of_them=retry_errors)
    there = target.done()
    wanted = {item.key: item for item in asked if isinstance(item, Item)}
    left = [item for key, item in wanted.items() if key not in there]
    bad = [item for item in asked if isinstance(item, BadItem)]
    for item in bad:
        target.fail(item.key, item.row, item.name, item.error)
    return left, {DRAWN: 0, THERE: len(wanted) - len(left), FAILED: len(bad)}
