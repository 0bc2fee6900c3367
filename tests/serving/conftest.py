"""An application of tiny bundles, asked in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from starlette.testclient import TestClient

from fastvar import Pipeline
from fastvar.serving.app import create_app
from fastvar.serving.log import Log
from fastvar.serving.options import ServeOptions

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
