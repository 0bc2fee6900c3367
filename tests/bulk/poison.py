"""The drawing process, which some prompts kill: "poison" always, "once" at its first attempt, "slow" never."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

from fastvar.bulk import processes
from fastvar.bulk.folder import BulkFolder
from fastvar.runtime.pipeline import Pipeline

draw = Pipeline.draw
FIRST = Path(os.environ.get("FIRST_ATTEMPT", "first"))


def deadly(self: Pipeline, requests: Any, *arguments: Any, **named: Any) -> Any:
    for request in requests:
        time.sleep(float(os.environ.get("PACE", "0")))
        if request.subject == "poison" or (request.subject == "once" and not FIRST.exists()):
            FIRST.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return draw(self, requests, *arguments, **named)


def main() -> None:
    Pipeline.draw = deadly  # type: ignore[method-assign]  # kills
    processes.main()


def full_disk() -> None:
    """The disk has no room from the fourth image of a process on."""
    save, count = BulkFolder.save, itertools.count(1)

    def no_room(self: BulkFolder, key: str, data: bytes) -> None:
        if next(count) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, key, data)

    BulkFolder.save = no_room  # type: ignore[method-assign]  # fails
    processes.main()
