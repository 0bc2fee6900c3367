"""The application: its addresses, and what they answer that is no image. Any ASGI server can run it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ..errors import UnknownWordsWarning
from .fleet import Fleet
from .guards import Guard
from .images import draw
from .log import Log
from .metrics import Metrics
from .model import ServedModel
from .options import ServeOptions
from .wire import answers
from .wire.answers import ApiError, json_response
from .wire.openapi import openapi

CODES = {404: "not_found", 405: "method_not_allowed", 400: "invalid_value"}


def create_app(
    bundles: Mapping[str, Any],
    options: ServeOptions | None = None,
    *,
    loaded: Callable[[ServedModel], object] = lambda model: None,
    log: Log | None = None,
    **load_options: Any,
) -> Starlette:
    """An application that draws with bundles.

    Args:
        bundles: folders by the names that clients ask for.
        options: how the server behaves.
        loaded: called with each model when it has been loaded, or when that has failed (`failure`); in its thread.
        log: where entries go; stderr by default.
        load_options: arguments of `Pipeline.load`.

    Raises:
        InputError: an alias that stands for no model.
    """
    options, metrics = options or ServeOptions(), Metrics()
    models = [ServedModel.of_bundle(name, folder, options, metrics, **load_options) for name, folder in bundles.items()]
    return app_of(models, options, metrics, log or Log(), loaded)


def app_of(
    models: Sequence[ServedModel],
    options: ServeOptions,
    metrics: Metrics,
    log: Log,
    loaded: Callable[[ServedModel], object] = lambda model: None,
) -> Starlette:
    """An application of models that are there already; it starts and stops them."""
    fleet = Fleet(models, options, metrics, log)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        warnings.simplefilter("ignore", UnknownWordsWarning)  # answers tell of them
        for model in models:
            model.start(lambda model=model: loaded(model))  # type: ignore[misc]  # mypy cannot infer the default
        yield
        await fleet.stop()

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics_text),
        Route("/openapi.json", description),
        Route("/v1/models", list_models),
        Route("/v1/models/{model}", one_model),
        Route("/v1/images/generations", draw, methods=["POST"]),
        Route("/v1/images/edits", draw, methods=["POST"]),
    ]
    return guarded(fleet, routes, lifespan)


def guarded(fleet: Fleet, routes: Sequence[Route], lifespan: Any = None) -> Starlette:
    """An application whose requests pass the guard first, and whose errors are answers. It stands for `fleet`."""
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Guard, fleet=fleet)],
        exception_handlers={HTTPException: _told},
    )
    app.router.redirect_slashes = False
    app.state.fleet = fleet
    app.state.page, app.state.page_headers = _read_page()
    return app


async def _told(request: Request, error: Exception) -> Response:
    """What Starlette refuses, in our form."""
    assert isinstance(error, HTTPException)
    path, status, allowed = request.url.path[:200], error.status_code, (error.headers or {}).get("Allow", "GET")
    told = {
        404: {"problem": f"nothing is at {path}", "expected": "an address of /openapi.json"},
        405: {"problem": f"{request.method} of {path} does nothing", "expected": allowed},
    }.get(status, {"problem": error.detail, "fix": "send the body as /openapi.json has it"})
    return ApiError(status, CODES.get(status, "invalid_value"), **told, headers=error.headers).response


def _fleet(request: Request) -> Fleet:
    found: Fleet = request.app.state.fleet
    return found


async def health(request: Request) -> Response:
    """Whether the process is sound: 200, or 503 when a drawing thread has ended by itself."""
    dead = [model.name for model in _fleet(request).models.values() if model.has_died]
    if dead:
        fix = "restart the server; its log says what happened"
        raise ApiError(503, "not_healthy", f"{', '.join(dead)} draws no longer", fix=fix)
    return json_response({"status": "ok"})


async def ready(request: Request) -> Response:
    """Whether requests are taken: 200, or 503 while bundles are loaded and when the server is about to end."""
    fleet = _fleet(request)
    fleet.check_open()
    for model in fleet.models.values():
        if not model.is_ready:
            raise answers.loading(model.name)
    return json_response({"status": "ready"})


async def metrics_text(request: Request) -> Response:
    return Response(_fleet(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def list_models(request: Request) -> Response:
    return json_response({"object": "list", "data": _fleet(request).described()})


async def one_model(request: Request) -> Response:
    fleet, name = _fleet(request), request.path_params["model"]
    return json_response(fleet.describe(name, fleet.model_named(name)))


async def description(request: Request) -> Response:
    fleet = _fleet(request)
    return json_response(openapi(fleet.described(), bool(fleet.options.api_keys)))


async def page(request: Request) -> Response:
    return Response(request.app.state.page, headers=request.app.state.page_headers, media_type="text/html")


def _read_page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers that let nothing run but what is written in it."""
    text = files(__package__).joinpath("page/index.html").read_bytes()
    script, style = (_hashes(text, tag) for tag in (b"script", b"style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"content-security-policy": policy, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
    return text, headers


def _hashes(page: bytes, tag: bytes) -> str:
    blocks = re.findall(rb"<" + tag + rb"[^>]*>(.*?)</" + tag + rb">", page, flags=re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(block).digest()).decode()}'" for block in blocks)
