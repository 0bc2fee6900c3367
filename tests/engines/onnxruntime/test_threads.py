"""Which threads the sessions of a process run with; a process of its own each, for the first session decides."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastvar.engines.onnxruntime import threads
from tests.conftest import REPOSITORY

SESSIONS = 40
PRELUDE = f"""
import onnxruntime, sys
from fastvar.engines.onnxruntime import threads
from fastvar.engines.registry import get_backend
from fastvar.errors import BackendError
from tests.models.small_bundle import linear, linear_spec

def count():
    return int(open("/proc/self/status").read().split("Threads:")[1].split()[0])

def added(threads):
    '''Threads that so many loaded engines bring.'''
    backend = get_backend("onnxruntime", threads=threads)
    engine, spec = backend.build(linear()).engine, linear_spec(backend.version())
    before = count()
    engines = [backend.load(engine, spec) for _ in range({SESSIONS})]
    return count() - before

def refused(threads):
    try:
        added(threads)
    except BackendError as error:
        return str(error)
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + program], check=False, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout, "nothing is printed, whatever was tried"


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


def test_what_is_said_of_the_pools_is_what_is_done():
    asked = "get_backend('onnxruntime').keeps_threads_apart"
    most = threads.MOST_OF_A_SESSION
    run(f"assert {asked}({most}); assert not {asked}({most + 1}); assert added(3); assert {asked}({most + 1})")
    run(f"threads.BOUNDED_SPIN_SINCE = (999,); assert not {asked}(1); assert added(1) == 0; assert not {asked}(1)")


def test_every_engine_has_its_own_pool():
    run(f"assert added(3) == 2 * {SESSIONS}; assert added(1) == 0; assert added(2) == {SESSIONS}")


def test_many_threads_are_shared():
    most = threads.MOST_OF_A_SESSION + 1
    run(f"assert added({most}) == 0; assert added(None) == 0; assert 'already number {most}' in refused(3)")


def test_a_library_whose_threads_cannot_be_bounded_shares_them():
    run("threads.BOUNDED_SPIN_SINCE = (999,); assert added(3) == 0; assert 'already number 3' in refused(2)")


def test_the_pool_of_the_embedding_program_is_used():
    run(
        "onnxruntime.set_global_thread_pool_sizes(2, 1); assert 'cannot be given 3' in refused(3);"
        "assert added(None) == 0; assert 'cannot be given 3' in refused(3)"
    )


def test_the_pool_that_the_embedding_program_makes_later_is_used():
    run(f"assert added(2) == {SESSIONS}; onnxruntime.set_global_thread_pool_sizes(2, 1); assert added(None) == 0")


def test_an_older_library_joins_the_pool_of_the_embedding_program():
    run(
        "threads.BOUNDED_SPIN_SINCE = (999,); onnxruntime.set_global_thread_pool_sizes(2, 1)\n"
        "assert added(None) == 0; assert 'cannot be given 3' in refused(3)"
    )
