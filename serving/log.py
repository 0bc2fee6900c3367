"""What a server writes down: a JSON object a line, on stderr. Prompts are left out unless they are asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any


def to_stderr(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


class Log:
    """Writes entries by `write`, one line each."""

    def __init__(self, write: Callable[[str], object] = to_stderr) -> None:
        self._write = write

    def entry(self, event: str, facts: Mapping[str, Any], level: str = "info") -> None:
        now = time.time()
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e3):03d}Z"
        self._write(json.dumps({"time": when, "level": level, "event": event, **facts}, default=str))

    def bug(self, error: BaseException, facts: Mapping[str, Any]) -> None:
        """What nobody expected, with its traceback: for a report."""
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.entry("error", {**facts, "error": repr(error), "traceback": trace}, "error")


class LogHandler(logging.Handler):
    """Entries of libraries, uvicorn's among them, in the same form."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        facts: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            facts["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        self._log.entry("library", facts, record.levelname.lower())
