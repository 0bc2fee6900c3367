"""A bundle that draws what it is asked for, a server of it, and a browser on the server's page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from demo.bundles import CHECKPOINT, SAMPLING, SIZE
from tests.conftest import made_once, trace_fast
from tests.serving.browser import chromium, opened, settled
from tests.serving.processes import Served, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="session")
def demo_bundle(shared: Path, engine_cache: Path) -> Path:
    """The demo's checkpoint at its size, pruned; seven scales; read only."""
    import fastvar

    trace_fast()

    def build(out: Path) -> None:
        options = {"size": SIZE, "policy": "fastvar", "guidance": "on", "sampling": SAMPLING}
        fastvar.build(CHECKPOINT, out=out, cache=engine_cache, **options)

    return made_once(shared / "demo", build)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium; skips where it or playwright is missing."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: Browser, demo_bundle: Path) -> Iterator[Served]:
    """A server of the demo's bundle, shared by a module's tests."""
    with serving(demo_bundle) as served:
        yield served


@pytest.fixture
def page(browser: Browser, server: Served) -> Iterator[Page]:
    """The server's page on a desktop, ready."""
    with opened(browser, server.url) as page:
        settled(page)
        yield page
