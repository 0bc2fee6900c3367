"""Threads that sessions of onnxruntime run with: a pool for each session, or one pool for all of the process.

Threads wait for the next operation by spinning. Those of one pool for all spin for longer than most operations take,
and nothing can be set about it: on a busy machine they hold the cores that their partners wait for. Pools of sessions
can be told how long to spin, so they are what is used, but for where that would make hundreds of threads.
"""

from __future__ import annotations

import threading
from typing import Any

from ...core.platform import usable_cores
from ...errors import BackendError

SPIN_US = 50  # about the pause between two operations; threads sleep through longer ones
MOST_OF_A_SESSION = 8  # threads; a bundle has some fifty sessions
BOUNDED_SPIN_SINCE = (1, 26)  # onnxruntime
ONE_FOR_ALL = "when using a global thread pool"  # so the library refuses a session that wants a pool of its own

_lock = threading.Lock()
_is_shared: bool | None = None  # whether there is one pool for all: decided with the first session
_shared_threads: int | None = None  # of that pool, where it is fastvar's


def choose_pool(ort: Any, version: tuple[int, ...], threads: int | None, options: Any) -> None:
    """Say in a session's options which threads it runs with: so many, or one for each usable core.

    Raises:
        BackendError: the process has one pool for all, of another number of threads.
    """
    global _is_shared
    wanted = threads or usable_cores()
    with _lock:
        if _is_shared is None:
            _is_shared = shares_pool(version, wanted)
            if _is_shared:
                _make_shared_pool(ort, threads, wanted)
        if _is_shared:
            _check_shared_pool(threads)
            options.use_per_session_threads = False
            return
    options.use_per_session_threads = True
    options.intra_op_num_threads = wanted
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))


def shares_pool(version: tuple[int, ...], threads: int) -> bool:
    """Whether sessions of so many threads run in one pool for all of the process, decided by the first of them."""
    if _is_shared is not None:
        return _is_shared
    return version < BOUNDED_SPIN_SINCE or threads > MOST_OF_A_SESSION


def join_shared_pool(error: Exception, threads: int | None) -> bool:
    """Whether a session was refused because the embedding program has made one pool for all, which serves it as well.

    Raises:
        BackendError: that pool, and a number of threads was asked for.
    """
    global _is_shared
    if _is_shared or ONE_FOR_ALL not in str(error):
        return False
    if threads is not None:
        raise _not_given(threads, error) from error
    _is_shared = True
    return True


def _make_shared_pool(ort: Any, threads: int | None, wanted: int) -> None:
    global _shared_threads
    try:
        ort.set_global_thread_pool_sizes(wanted, 1)
        _shared_threads = wanted
    except (ort.capi.onnxruntime_pybind11_state.Fail, RuntimeError) as error:
        if threads is not None:  # the embedding program has made a pool of a size of its own
            raise _not_given(threads, error) from error


def _check_shared_pool(threads: int | None) -> None:
    if threads in (None, _shared_threads):
        return
    if _shared_threads is None:
        raise _not_given(threads, "the embedding program has made a thread pool for all sessions")
    raise BackendError(
        f"onnxruntime's threads are shared by the process and already number {_shared_threads}",
        expected=f"{_shared_threads} threads, not {threads}",
        fix="give the number of threads where the first pipeline is made",
    )


def _not_given(threads: int | None, error: object) -> BackendError:
    return BackendError(
        f"onnxruntime cannot be given {threads} threads: {error}",
        expected="a process without a thread pool that all of onnxruntime shares",
        fix="leave the number of threads away: the pool that is there is used",
    )
