"""Work in a forked child, which may be killed at a moment of the parent's choice, crash or hang.

A fork costs milliseconds where a new process would import torch for seconds. The parent must not have opened an engine:
threads of a library's pool do not live on in a child.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastvar.errors import FastvarError

GRACE_SECONDS = 300.0


@dataclass(frozen=True)
class Outcome:
    """How a child ended: "done" with a value, "refused" in words, "crashed" with a traceback or a signal, "killed" by
    the parent on purpose, or "hung".
    """

    kind: str
    value: Any = None
    seconds: float = 0.0


def run_child(
    work: Callable[[], Any],
    *,
    kill_after: float | None = None,
    kill_with: int = signal.SIGKILL,
    timeout: float = GRACE_SECONDS,
) -> Outcome:
    """Run `work` in a child; its value must be JSON. `kill_after` seconds it is sent a signal, if it still runs."""
    reading, writing = os.pipe()
    start = time.perf_counter()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _in_child(work, reading, writing)
    os.close(writing)
    told = _read(reading, start + (timeout if kill_after is None else kill_after))
    killed = told is None
    if killed:
        os.kill(child, signal.SIGKILL if kill_after is None else kill_with)
        if kill_with != signal.SIGKILL and kill_after is not None:
            told = _read(reading, time.perf_counter() + GRACE_SECONDS)
    os.close(reading)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - start
    if killed and not told:
        return Outcome("hung" if kill_after is None else "killed", seconds=seconds)
    if not told:
        return Outcome("crashed", f"ended with status {status}", seconds)
    kind, value = json.loads(told)
    return Outcome(kind, value, seconds)


def _in_child(work: Callable[[], Any], reading: int, writing: int) -> None:
    """Never returns: the parent's clean-up is not the child's to do."""
    os.close(reading)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        told: tuple[str, Any] = ("done", work())
    except FastvarError as error:
        told = ("refused", str(error))
    except KeyboardInterrupt:
        told = ("interrupted", None)
    except SystemExit as exit_:
        told = ("exit", exit_.code)
    except BaseException:  # noqa: BLE001 told to the parent as the crash it is
        told = ("crashed", traceback.format_exc())
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(json.dumps(told).encode())
    os._exit(0)


def _read(pipe: int, until: float) -> bytes | None:
    """All that the child says, up to its end; None where it has not ended by then."""
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.perf_counter()))
        if not ready:
            return None
        block = os.read(pipe, 1 << 16)
        if not block:
            return b"".join(parts)
        parts.append(block)
