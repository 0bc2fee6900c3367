"""stdout and stderr that may fail: what a command prints must not stop what it does.

Readers of pipes go away, disks that output is written to are full, and not every encoding has every character.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..errors import InputError

CLOSED = (errno.EPIPE, errno.EINVAL)  # what a pipe without a reader says, the latter on Windows


def tell(line: str) -> None:
    """A line on stdout, at once."""
    print(line, flush=True)


def tell_trouble(line: str) -> None:
    """A line on stderr."""
    if sys.stderr is not None:  # else print would take stdout
        print(line, file=sys.stderr, flush=True)


class SparedStream:
    """A text stream that writes as long as it can, and then drops what it is given.

    Characters that its encoding does not have are written as escapes. `lost` is the error that ended it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        try:
            self._written(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _written(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def _lose(self, error: OSError) -> None:
        """What is buffered goes nowhere: it would fail again, and at last when the interpreter ends."""
        self.lost = self.lost or error
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):  # a stream without a descriptor, as tests have
            pass


@contextmanager
def spared_streams() -> Iterator[None]:
    """Within the block stdout and stderr are spared."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_spared(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, SparedStream):
                stream.flush()
        sys.stdout, sys.stderr = before


def _spared(stream: TextIO) -> Any:
    """None is a stream that was closed from the start, and stays so."""
    return None if stream is None else SparedStream(stream)


def check_printed() -> None:
    """For commands whose product is what they print: a reader that has gone had enough, all else is an error.

    Raises:
        InputError: stdout could not be written.
    """
    if isinstance(sys.stdout, SparedStream):
        sys.stdout.flush()
        lost = sys.stdout.lost
        if lost is not None and lost.errno not in CLOSED:
            raise InputError(f"cannot write to stdout: {lost.strerror or lost}", fix="free some space, or use a file")
