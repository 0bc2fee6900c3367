"""A hub on loopback, and processes that ask it: huggingface_hub reads its environment when it is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.hub import FakeHub, fake_hub

Ask = Callable[..., str]
# What a process does: fetches files of a repository, and tells where they lie, or what is wrong.
FETCH = """
import sys
from fastvar.errors import FastvarError
from fastvar.hub.reference import parse_reference
from fastvar.hub.repository import HubAccess, Repository
try:
    found = Repository.open(parse_reference(sys.argv[1]), HubAccess())
    print(found.fetch(sys.argv[2:] or sorted(found.listing.files)))
except FastvarError as error:
    print(error)
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def ask(hub: FakeHub, tmp_path: Path) -> Ask:
    """Fetch files of a repository, all of them by default, in a process of its own; gives what it prints."""

    def call(reference: str, *files: str, **environment: str) -> str:
        hub.asked.clear()
        done = subprocess.run(
            [sys.executable, "-c", FETCH, reference, *files],
            env=hub.environment(tmp_path) | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return call
