"""An application of tiny bundles, asked in this process; a server of the demo's bundle, and a browser on its page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import pytest
from starlette.testclient import TestClient

from demo.bundles import CHECKPOINT, SAMPLING, SIZE
from fastvar import Pipeline
from fastvar.serving.app import create_app
from fastvar.serving.log import Log
from fastvar.serving.options import ServeOptions
from tests.conftest import made_once, trace_fast
from tests.serving.browser import chromium, opened, settled
from tests.serving.processes import Served, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ALIASES = {"gpt-image-1": "texts"}
Asking = Callable[..., Any]


class Asked(TestClient):
    """A client of an application, and what that wrote into its log."""

    log: list[dict[str, Any]]


@pytest.fixture(scope="session")
def make_client(batched_bundle: Path) -> Callable[..., Any]:
    """Opens an application, as a context; waits until its bundles are loaded."""
    from contextlib import contextmanager

    @contextmanager
    def made(options: ServeOptions | None = None, bundles: dict[str, Path] | None = None) -> Iterator[Asked]:
        loaded, lines = Event(), list[dict[str, Any]]()
        models = bundles or {"texts": batched_bundle}
        left = set(models)

        def told(model: Any) -> None:
            assert model.failure is None, model.failure
            left.discard(model.name)
            if not left:
                loaded.set()

        log = Log(lambda line: lines.append(json.loads(line)))
        app = create_app(models, options or ServeOptions(aliases=ALIASES), loaded=told, log=log)
        with Asked(app) as client:
            assert loaded.wait(60)
            client.log = lines
            yield client

    return made


@pytest.fixture(scope="module")
def client(make_client: Asking) -> Iterator[Asked]:
    with make_client() as found:
        yield found


@pytest.fixture(scope="module")
def pipe(batched_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(batched_bundle) as found:
        yield found


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
