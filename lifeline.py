"""Processes that end with whoever started them, and are ended by nobody else.

They answer requests that come through a pipe. The pipe is their lifeline: it is closed when the parent ends, however
it ends, and a thread that reads ahead notices it in the middle of their work.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import IO

PATIENCE = 2.0  # seconds that a process has to clean up
TERMINATED = 143
HEADER_BYTES = 8  # of a frame: its length


def start(command: Sequence[str], folder: str | None = None) -> subprocess.Popen[bytes]:
    """A process with pipes to it and from it. Signals to our group, Ctrl-C say, are for us alone to answer."""
    pipe = subprocess.PIPE
    if sys.platform == "win32":
        group = subprocess.CREATE_NEW_PROCESS_GROUP
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=folder, creationflags=group)
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=folder, start_new_session=True)


def requests() -> Iterator[bytes]:
    """Frames that come through stdin; when it is closed, this process ends at once.

    Call it before anything that takes long: a parent that ends while torch is imported is noticed too.
    """
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # Unbuffered: a thread that waits in the buffer of sys.stdin would keep the interpreter from ending in order.
    pipe = FileIO(0, closefd=False)

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


def end_all(processes: Sequence[subprocess.Popen[bytes]], patience: float = PATIENCE) -> None:
    """Ask processes to end, and kill those that have not after so many seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
