"""What stands before the replicas on Ray Serve: it guards the sockets, reads `model`, and hands requests on."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError, RayTaskError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message

from ..serving.app import guarded, page
from ..serving.fleet import Fleet
from ..serving.images import event, unless_gone
from ..serving.log import Log
from ..serving.metrics import Metrics
from ..serving.wire.answers import ApiError, json_response, loading, missing, no_model
from ..serving.wire.openapi import openapi
from .replica import options_of

HEADERS = (b"authorization", b"content-type", b"content-length", b"sec-fetch-site")
FORM_MODEL = re.compile(rb'name="model"\r\n\r\n([^\r\n]{0,256})\r\n')
MOST_REQUESTS = 10_000  # that an ingress holds, each of them waiting for a replica: Ray's own limit is 5
READY_SECONDS = 2.0  # for a replica to say that it is there
GONE = "the replica that drew it is gone"


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MOST_REQUESTS)
class Ingress:
    """Answers what needs no bundle, reads which is meant by a request that does, and hands that on."""

    def __init__(self, replica: Any, names: list[str], aliases: dict[str, str], options: dict[str, Any]) -> None:
        self._replica, self._names, self._aliases = replica, names, aliases
        self._models = {name: _model(name) for name in (*names, *aliases)}
        self._fleet = Fleet([], options_of({**options, "aliases": {}}), Metrics(), Log())
        self._app = guarded(
            self._fleet,
            [
                Route("/", page),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/openapi.json", self._description),
                Route("/v1/models", self._list),
                Route("/v1/models/{model}", self._one),
                Route("/v1/images/generations", self._draw, methods=["POST"]),
                Route("/v1/images/edits", self._draw, methods=["POST"]),
            ],
        )

    async def __call__(self, _request: Request) -> Response:
        return _Answered(self._app)

    async def _health(self, _request: Request) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, _request: Request) -> Response:
        if not await self._ask_replica():
            raise loading("every replica")
        return json_response({"status": "ready"})

    async def _metrics(self, _request: Request) -> Response:
        fix = "scrape Ray's metrics: series that begin with ray_fastvar_, by replica"
        raise ApiError(404, "not_found", "every replica counts for itself", fix=fix)

    async def _description(self, _request: Request) -> Response:
        await self._ask_replica()
        return json_response(openapi(list(self._models.values()), bool(self._fleet.options.api_keys)))

    async def _list(self, _request: Request) -> Response:
        await self._ask_replica()
        return json_response({"object": "list", "data": list(self._models.values())})

    async def _one(self, request: Request) -> Response:
        return self._handed_on(request, self._known(request.path_params["model"]), b"")

    async def _draw(self, request: Request) -> Response:
        body = await request.body()
        asked = _named(request, body)
        if asked is None and len(self._names) > 1:
            raise missing("model", f"one of {', '.join(self._models)}")
        return self._handed_on(request, self._names[0] if asked is None else self._known(asked), body)

    async def _ask_replica(self) -> bool:
        """What a replica has loaded is known better from now on; gives whether one answered."""
        try:
            found = await asyncio.wait_for(self._replica.described.remote(), READY_SECONDS)
        except (asyncio.TimeoutError, RayError):
            return False
        self._models |= {model["id"]: model for model in found}
        return True

    def _known(self, asked: str) -> str:
        """The bundle of a name or alias.

        Raises:
            ApiError: there is none.
        """
        name = self._aliases.get(asked, asked)
        if name not in self._names:
            raise no_model(asked[:200], tuple(self._models), "serve it under that name by aliases")
        return name

    def _handed_on(self, request: Request, name: str, body: bytes) -> Response:
        scope = _scope(request)
        # Replicas that have the bundle come first; where that one has no place, any: it then loads the bundle too.
        ways = [{"multiplexed_model_id": name}, {}] if len(self._names) > 1 else [{}, {}]
        handles = [self._replica.options(method_name="answer", stream=True, **way) for way in ways]
        return _Relayed([lambda handle=handle: handle.remote(name, scope, body) for handle in handles])


class _Answered(Response):
    """What an application answers."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app(scope, receive, send)


class _Relayed(Response):
    """An answer that comes message by message from a replica: of the first that has a place in its queue."""

    def __init__(self, ways: list[Any]) -> None:
        super().__init__()
        self._ways = ways

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await unless_gone(receive, self._relay(send))

    async def _relay(self, send: Any) -> None:
        for ask in self._ways:
            messages, is_last = ask(), ask is self._ways[-1]
            try:
                start = await anext(aiter(messages))
                if start["status"] == 429 and not is_last:
                    continue
                await self._send_all(start, messages, send)
                return
            except RayTaskError:  # a bug: the guard writes it down
                raise
            except RayError as error:
                raise ApiError(503, "replica_lost", GONE, fix="ask again", headers={"retry-after": "1"}) from error
            finally:
                messages.cancel()

    async def _send_all(self, start: Message, messages: Any, send: Any) -> None:
        """A stream that breaks off is ended by an error that clients read; any other answer is not begun before it is
        whole.
        """
        if (b"content-type", b"text/event-stream") not in _plain(start["headers"]):
            for message in [start, *[message async for message in messages]]:
                await send(message)
            return
        await send(start)
        try:
            async for message in messages:
                await send(message)
        except RayError:
            broken = event(ApiError(503, "replica_lost", GONE, fix="ask again").body)
            await send({"type": "http.response.body", "body": broken, "more_body": False})


def _plain(headers: Any) -> set[tuple[bytes, bytes]]:
    """Headers, without what is said of a content type's charset."""
    return {(bytes(name).lower(), bytes(value).partition(b";")[0]) for name, value in headers}


def _named(request: Request, body: bytes) -> str | None:
    if request.headers.get("content-type", "").startswith("multipart/"):
        found = FORM_MODEL.search(body)
        return found[1].decode(errors="replace") if found else None
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):  # told by whoever reads it in full
        return None
    model = data.get("model") if isinstance(data, dict) else None
    return model if isinstance(model, str) else None


def _scope(request: Request) -> dict[str, Any]:
    """What the application needs of it, as plain values."""
    headers = [(name, value) for name, value in request.scope["headers"] if name in HEADERS]
    headers.append((b"x-request-id", request.scope["fastvar.log"]["request_id"].encode()))
    kept = ("http_version", "method", "scheme", "query_string")
    path = request.url.path
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "headers": headers,
        **{name: request.scope[name] for name in kept},
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(time.time()), "owned_by": "fastvar"}
