"""Drawing in processes of our own: one that dies is replaced, and what it was drawing is tried again."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.processes.lifeline import read_frame, requests, write_frame
from ..core.processes.own_process import OwnProcess, end_all
from ..errors import BundleError, FastvarError, InputError
from .folder import BulkFolder
from .items import Item

MOST_DEATHS_AT_START = 3
PASSES = 4  # that a worker is given at a time
STATEMENT = f"import {__name__} as processes; processes.main()"
News = queue.SimpleQueue[tuple["_Worker", dict[str, Any] | None]]
READY, DONE = "ready", "done"


@dataclass(frozen=True)
class DrawerArguments:
    """What a `Drawer` is made of, as plain values. most: images of the bundle's largest pass."""

    bundle: str
    digest: str
    most: int
    folder: str
    image_format: str
    quality: int | None
    load_options: dict[str, Any]

    def share(self, left: int, workers: int) -> int:
        """How many images a worker is given at a time: some passes, for it to go from one to the next without asking,
        but no more than leave enough for the others.
        """
        return max(1, min(self.most * PASSES, -(-left // workers)))

    def drawer(self) -> Any:
        from .drawer import Drawer

        return Drawer(
            Path(self.bundle), self.digest, Path(self.folder), self.image_format, self.quality, self.load_options
        )


class _Worker:
    """A process with a pipeline, and what it was given to draw. `news` gets what it says, and None when it has died."""

    def __init__(self, arguments: DrawerArguments, news: News) -> None:
        self._process = OwnProcess(STATEMENT, [json.dumps(vars(arguments))])
        self.holds: dict[str, Item] = {}
        self.is_ready = False
        self._news = news
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def process(self) -> OwnProcess:
        return self._process

    def give(self, items: Sequence[Item]) -> None:
        self.holds = {item.key: item for item in items}
        with suppress(OSError):  # it is dead: whoever listens says so
            write_frame(self._process.stdin, json.dumps([item.to_json() for item in items]).encode())

    def _listen(self) -> None:
        try:
            while True:
                self._news.put((self, json.loads(read_frame(self._process.stdout))))
        except (EOFError, OSError, ValueError):
            self._news.put((self, None))


def draw_in_processes(
    items: Sequence[Item], arguments: DrawerArguments, workers: int, report: Callable[[str, str], object]
) -> None:
    """Draw all items; `report` is told the key of each and what became of it.

    Raises:
        FastvarError: the bundle cannot be opened.
        InputError: processes die before they draw anything, or the folder cannot be written.
    """
    news: News = queue.SimpleQueue()
    left, running = deque(items), list[_Worker]()
    deaths_at_start = 0
    try:
        running = [_Worker(arguments, news) for _ in range(min(workers, len(items)))]
        while running:
            worker, heard = news.get()
            if worker not in running:  # it was ended, and has closed its pipe
                continue
            if heard is None:
                running.remove(worker)
                deaths_at_start = 0 if worker.is_ready else deaths_at_start + 1
                if deaths_at_start >= MOST_DEATHS_AT_START:
                    how, _ = worker.process.death()
                    fix = "use fewer --workers if memory is short; `fastvar generate` shows how one image does"
                    raise InputError(f"the drawing process {how}", fix=fix)
                worker.process.end()
                left.extendleft(reversed(worker.holds.values()))
                if left:
                    running.append(_Worker(arguments, news))
            elif "error" in heard:
                raise BundleError(**heard["error"])
            elif "unwritable" in heard:
                raise InputError(**heard["unwritable"])
            elif "key" in heard:
                worker.holds.pop(heard["key"], None)
                report(heard["key"], heard["state"])
            else:  # ready, or done
                worker.is_ready = True
                some = [left.popleft() for _ in range(min(arguments.share(len(left), workers), len(left)))]
                if some:
                    worker.give(some)
                else:
                    running.remove(worker)
                    worker.process.end()
    finally:
        end_all([worker.process for worker in running])
        # Ended by us, they have not died of what they held.
        held = [key for worker in running for key in worker.holds]
        BulkFolder.of(arguments.folder, arguments.image_format).ended(held)


def main() -> None:
    """The process: draws what it is given, and tells of every image. SIGTERM ends it at once: who started it removes
    what is half written.
    """
    asked, out = requests(), sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever else prints

    def tell(**facts: Any) -> None:
        write_frame(out, json.dumps(facts).encode())

    try:
        drawer = DrawerArguments(**json.loads(sys.argv[1])).drawer()
    except FastvarError as error:
        tell(error=error.parts)
        return
    tell(state=READY)
    for frame in asked:
        try:
            drawer.draw([Item(**one) for one in json.loads(frame)], lambda key, state: tell(key=key, state=state))
        except InputError as error:
            tell(unwritable=error.parts)
            return
        tell(state=DONE)
