"""Processes that end with whoever started them, and are ended by nobody else.

They answer requests that come through a pipe. The pipe is their lifeline: it is closed when the parent ends, however
it ends, and a thread that reads ahead notices it in the middle of their work.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from io import FileIO
from typing import IO

TERMINATED = 143
HEADER_BYTES = 8  # of a frame: its length


def requests() -> Iterator[bytes]:
    """Frames that come through stdin; when it is closed, this process ends at once.

    Call it before anything that takes long: a parent that ends while torch is imported is noticed too.
    """
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # Unbuffered: a thread that waits in the buffer of sys.stdin would keep the interpreter from ending in order.
    pipe = FileIO(os.dup(0))  # whatever lies under that number later

    def listen() -> None:
        try:
            while True:
                waiting.put(read_frame(pipe))
        except (EOFError, OSError):
            os._exit(0)  # nobody is left to read an answer

    threading.Thread(target=listen, daemon=True).start()
    return iter(waiting.get, None)


def clean_up_when_terminated() -> None:
    """SIGTERM ends this process in order: its temporary files go."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))


def read_frame(pipe: IO[bytes] | FileIO) -> bytes:
    """The bytes of one `write_frame`.

    Raises:
        EOFError: the pipe was closed.
    """
    return _exactly(pipe, int.from_bytes(_exactly(pipe, HEADER_BYTES), "little"))


def _exactly(pipe: IO[bytes] | FileIO, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:  # a pipe gives what is there
        block = pipe.read(size - len(found))
        if not block:
            raise EOFError
        found += block
    return bytes(found)


def write_frame(pipe: IO[bytes], data: bytes) -> None:
    """Bytes that the other side reads as one."""
    pipe.write(len(data).to_bytes(HEADER_BYTES, "little") + data)
    pipe.flush()
