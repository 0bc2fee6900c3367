"""`serve run fastvar.ray_serve:app bundles=NAME=FOLDER`: the server of `fastvar serve` on Ray Serve.

An ingress reads `model` and hands the request to a replica that has that bundle loaded; there the very application of
`fastvar serve` answers it. So fields, errors, streams and cancelling are those of one machine, and the replica's own
queue says 429 before Ray would drop a request with a text that no client reads.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers of every cluster

from .core.platform import needs_extra
from .errors import FastvarError, InputError

with needs_extra("ray"):
    from ray import serve
with needs_extra("serve"):
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Message

    from .serving.app import app_of
    from .serving.images import unless_gone
    from .serving.log import Log
    from .serving.metrics import Metrics
    from .serving.model import ServedModel
    from .serving.options import ServeOptions, read_aliases
    from .serving.wire.answers import ApiError, body_too_large, json_response, missing, no_model

HEADERS = ("authorization", "content-type", "content-length", "x-request-id", "sec-fetch-site")
FORM_MODEL = re.compile(rb'name="model"\r\n\r\n([^\r\n]{0,256})\r\n')
MOST_BODY = 50 << 20
MOST_BUNDLES = 2  # that a replica keeps loaded


class Served:
    """A bundle and the application that draws with it, as `fastvar serve` has it, without a socket."""

    def __init__(self, name: str, folder: str, options: ServeOptions, load_options: Mapping[str, Any]) -> None:
        metrics, self._loaded = Metrics(), asyncio.Event()
        loop = asyncio.get_running_loop()
        self._model = ServedModel.of_bundle(name, Path(folder), options, metrics, **load_options)
        self.app = app_of([self._model], options, metrics, Log(), lambda _: loop.call_soon_threadsafe(self._loaded.set))
        self._lifespan = self.app.router.lifespan_context(self.app)

    async def start(self) -> Served:
        """Load the bundle, in its drawing thread.

        Raises:
            FastvarError: it cannot be.
        """
        await self._lifespan.__aenter__()
        await self._loaded.wait()
        if self._model.failure is not None:
            raise self._model.failure
        return self

    def __del__(self) -> None:
        """Ray drops a bundle that it needs no longer: its thread gives the pipeline back."""
        self._model.end()

    async def messages(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """What the application sends; a caller that stops reading is a client that is gone."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        gone, first = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if first:
                return first.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(scope, receive, sent.put)
            finally:
                await sent.put(None)

        running = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            gone.set()
            await asyncio.wait({running}, timeout=10)
            running.cancel()


@serve.deployment(
    ray_actor_options={"num_cpus": 1},
    autoscaling_config={"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 2},
)
class Replica:
    """Draws with the bundles that it is asked for, a few of which it keeps loaded."""

    def __init__(self, bundles: dict[str, str], options: dict[str, Any], load_options: dict[str, Any]) -> None:
        self._bundles, self._options, self._load_options = bundles, options, load_options

    @serve.multiplexed(max_num_models_per_replica=MOST_BUNDLES)  # type: ignore[untyped-decorator]  # of ray
    async def bundle(self, name: str) -> Served:
        aliases = {alias: own for alias, own in self._options.get("aliases", {}).items() if own == name}
        options = ServeOptions(**{**self._options, "aliases": aliases})
        return await Served(name, self._bundles[name], options, self._load_options).start()

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The messages of an answer, in ASGI's terms."""
        try:
            served = await self.bundle(serve.get_multiplexed_model_id())
        except FastvarError as error:
            refused = ApiError(503, "not_loaded", f"the bundle cannot be loaded: {error}")
            for message in _plain(refused.response):
                yield message
            return
        async for message in served.messages(scope, body):
            yield message


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Ingress:
    """Reads which model is meant, and hands the request on."""

    def __init__(self, replica: Any, names: list[str], aliases: dict[str, str]) -> None:
        self._replica, self._names, self._aliases = replica, names, aliases

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/v1/models":
            return json_response({"object": "list", "data": [_model(name) for name in (*self._names, *self._aliases)]})
        try:
            body = await _read(request)
            name = self._meant(request, body)
        except ApiError as error:
            return error.response
        handle = self._replica.options(method_name="answer", multiplexed_model_id=name, stream=True)
        return _Relayed(handle.remote(_scope(request), body))

    def _meant(self, request: Request, body: bytes) -> str:
        """The bundle that the request is for.

        Raises:
            ApiError: there is none of that name, or none is named among several.
        """
        known = (*self._names, *self._aliases)
        path = request.url.path
        asked = path.removeprefix("/v1/models/") if path.startswith("/v1/models/") else _named(request, body)
        name = self._aliases.get(asked, asked) if asked else None
        if name in self._names:
            return str(name)
        if asked:
            raise no_model(asked, known, "serve it under that name by aliases")
        if len(self._names) > 1 and path.startswith("/v1/"):
            raise missing("model", f"one of {', '.join(known)}")
        return self._names[0]


def _named(request: Request, body: bytes) -> str | None:
    if request.headers.get("content-type", "").startswith("multipart/"):
        found = FORM_MODEL.search(body)
        return found[1].decode(errors="replace") if found else None
    try:
        data = json.loads(body)
    except ValueError:  # told by whoever reads it in full
        return None
    model = data.get("model") if isinstance(data, dict) else None
    return model if isinstance(model, str) else None


async def _read(request: Request) -> bytes:
    """The body; what is too large is told by the application, for which its first bytes are enough."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MOST_BODY:
            raise body_too_large(f"{size} bytes or more", MOST_BODY)
    return b"".join(parts)


def _scope(request: Request) -> dict[str, Any]:
    """What the application needs of it, as plain values."""
    headers = [(name, value) for name, value in request.scope["headers"] if name.decode() in HEADERS]
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


class _Relayed(Response):
    """An answer that comes message by message from a replica."""

    def __init__(self, messages: Any) -> None:
        super().__init__()
        self._messages = messages

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_gone(receive, self._relay(send))
        finally:
            self._messages.cancel()

    async def _relay(self, send: Any) -> None:
        async for message in self._messages:
            await send(message)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fastvar"}


def _plain(response: Response) -> list[Message]:
    start: Message = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    return [start, {"type": "http.response.body", "body": response.body, "more_body": False}]


def app(arguments: dict[str, str]) -> Any:
    """The application that `serve run` and a serve.yaml name.

    Args:
        arguments: bundles, "NAME=FOLDER" joined by commas; aliases, "ALIAS=NAME" joined by commas; queue, drain,
            batch_wait_ms; replicas, the most of them; ongoing, how many requests a replica is meant to have;
            gpus, cpus of a replica; threads, memory as of `fastvar serve`.

    Raises:
        InputError: one is not known, or not understood.
    """
    known = ("bundles", "aliases", "queue", "drain", "batch_wait_ms", "replicas", "ongoing", "gpus", "cpus")
    if unknown := [name for name in arguments if name not in (*known, "threads", "memory")]:
        raise InputError(f"argument {unknown[0]!r} is not known", expected=f"some of {', '.join(known)}")
    bundles = read_aliases([part for part in arguments.get("bundles", "").split(",") if part])
    if not bundles:
        raise InputError("no bundles given", expected="bundles=NAME=FOLDER", fix="name one")
    aliases = read_aliases([part for part in arguments.get("aliases", "").split(",") if part])
    numbers: dict[str, Any] = {"queue": int, "drain": float, "batch_wait_ms": float}
    options = {name: read(arguments[name]) for name, read in numbers.items() if name in arguments}
    checked = ServeOptions(**options, aliases=aliases)
    load_options: dict[str, Any] = {"threads": int(arguments["threads"])} if "threads" in arguments else {}
    load_options |= {"memory_budget": arguments["memory"]} if "memory" in arguments else {}
    replica = Replica.options(  # type: ignore[attr-defined]  # ray's decorator gives a deployment
        # Ours is full first, and says so in a form that clients read; Ray's own refusal is plain text.
        max_ongoing_requests=checked.queue + 16,
        ray_actor_options={
            "num_cpus": float(arguments.get("cpus", 1)),
            "num_gpus": float(arguments.get("gpus", 0)),
        },
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": int(arguments.get("replicas", 1)),
            "target_ongoing_requests": float(arguments.get("ongoing", 2)),
        },
    )
    bound = replica.bind(bundles, {**options, "aliases": aliases}, load_options)
    return Ingress.bind(bound, list(bundles), aliases)  # type: ignore[attr-defined]  # the same
