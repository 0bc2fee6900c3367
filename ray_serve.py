"""`serve run fastvar.ray_serve:app bundles=NAME=FOLDER`: the server of `fastvar serve` on Ray Serve.

An ingress guards the sockets as `fastvar serve` does, reads `model`, and hands the request to a replica that has that
bundle loaded; there the very application of `fastvar serve` answers it. So fields, errors, streams and cancelling are
those of one machine, and a replica's own queue says 429 before Ray would drop a request with text that no client reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers of every cluster

from .core.platform import needs_extra
from .errors import FastvarError, InputError

with needs_extra("ray"):
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.metrics import Gauge
with needs_extra("serve"):
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route
    from starlette.types import Message

    from .serving.app import app_of, guarded, page
    from .serving.fleet import Fleet
    from .serving.images import event, unless_gone
    from .serving.log import Log
    from .serving.metrics import Metrics
    from .serving.model import ServedModel
    from .serving.options import ServeOptions, read_aliases, read_api_keys
    from .serving.wire.answers import ApiError, json_response, loading, missing, no_model
    from .serving.wire.openapi import openapi

HEADERS = (b"authorization", b"content-type", b"content-length", b"sec-fetch-site")
FORM_MODEL = re.compile(rb'name="model"\r\n\r\n([^\r\n]{0,256})\r\n')
MOST_BUNDLES = 2  # that a replica keeps loaded
MOST_REQUESTS = 10_000  # that an ingress holds, each of them waiting for a replica: Ray's own limit is 5
READY_SECONDS = 2.0  # for a replica to say that it is there
COUNTED_SECONDS = 5.0  # between copies of a replica's numbers into Ray's
GONE = "the replica that drew it is gone"


class Served:
    """A bundle and the application that draws with it, as `fastvar serve` has it, without a socket."""

    def __init__(self, name: str, folder: str, options: ServeOptions, load_options: Mapping[str, Any]) -> None:
        self.metrics, self._loaded = Metrics(), asyncio.Event()
        self._drain, self.is_ended = options.drain, False
        loop = asyncio.get_running_loop()
        self._model = ServedModel.of_bundle(name, Path(folder), options, self.metrics, **load_options)
        loaded = self._loaded.set
        self.app = app_of([self._model], options, self.metrics, Log(), lambda _: loop.call_soon_threadsafe(loaded))
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

    @property
    def has_died(self) -> bool:
        return self._model.has_died

    def described(self) -> list[dict[str, Any]]:
        """The bundle under its name and aliases, as /v1/models lists it."""
        fleet: Fleet = self.app.state.fleet
        return fleet.described()

    def __del__(self) -> None:
        """Ray drops a bundle for another one, in a thread of its own: what was begun is finished first."""
        end = time.monotonic() + self._drain
        while not self._model.is_idle and time.monotonic() < end:
            time.sleep(0.02)
        self.is_ended = True
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
    """Draws with the bundles that it is asked for, a few of which it keeps loaded; with the first from its start."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, bundles: dict[str, str], options: dict[str, Any], load_options: dict[str, Any]
    ) -> None:
        self._bundles, self._options, self._load_options = bundles, options, load_options
        self._served: dict[str, Served] = {}
        await self.bundle(next(iter(bundles)))
        self._counting = asyncio.create_task(self._count())

    @serve.multiplexed(max_num_models_per_replica=MOST_BUNDLES)  # type: ignore[untyped-decorator]  # of ray
    async def bundle(self, name: str) -> Served:
        aliases = {alias: own for alias, own in self._options.get("aliases", {}).items() if own == name}
        options = _options({**self._options, "aliases": aliases})
        self._served[name] = await Served(name, self._bundles[name], options, self._load_options).start()
        self._served = {name: served for name, served in self._served.items() if not served.is_ended}
        return self._served[name]

    async def answer(self, name: str, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """The messages of an answer, in ASGI's terms."""
        try:
            served = await self.bundle(name)
        except FastvarError as error:
            for message in _messages(ApiError(503, "not_loaded", f"the bundle cannot be loaded: {error}").response):
                yield message
            return
        async for message in served.messages(scope, body):
            yield message

    async def described(self) -> list[dict[str, Any]]:
        """What is loaded."""
        return [model for served in self._served.values() for model in served.described()]

    def check_health(self) -> None:
        """Ray starts another replica in place of one that raises here."""
        if dead := [name for name, served in self._served.items() if served.has_died]:
            raise RuntimeError(f"{', '.join(dead)} draws no longer")

    async def _count(self) -> None:
        """Copy the numbers of /metrics into Ray's, which says whose they are."""
        gauges: dict[str, Any] = {}
        while True:
            for served in self._served.values():
                for family in served.metrics.registry.collect():
                    for name, labels, value, *_ in family.samples:
                        if name.startswith("fastvar_"):
                            if name not in gauges:
                                gauges[name] = Gauge(name, family.documentation, tag_keys=tuple(labels))
                            gauges[name].set(value, tags=labels)
            await asyncio.sleep(COUNTED_SECONDS)


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MOST_REQUESTS)
class Ingress:
    """Answers what needs no bundle, reads which is meant by a request that does, and hands that on."""

    def __init__(self, replica: Any, names: list[str], aliases: dict[str, str], options: dict[str, Any]) -> None:
        self._replica, self._names, self._aliases = replica, names, aliases
        self._models = {name: _model(name) for name in (*names, *aliases)}
        self._fleet = Fleet([], _options({**options, "aliases": {}}), Metrics(), Log())
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


def _messages(response: Response) -> list[Message]:
    start: Message = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    return [start, {"type": "http.response.body", "body": response.body, "more_body": False}]


def _options(given: Mapping[str, Any]) -> ServeOptions:
    """Options by plain values; keys are read where they are needed, so that no one else holds them.

    Raises:
        InputError: the keys cannot be read, or a value is out of range.
    """
    plain = {**given}
    file = plain.pop("api_key_file", None)
    return ServeOptions(**plain, api_keys=read_api_keys(Path(file)) if file else ())


NUMBERS: dict[str, Any] = {"queue": int, "drain": float, "batch_wait_ms": float}
TEXTS = ("max_body", "api_key_file")
SCALING: dict[str, Any] = {
    "replicas": int,
    "least": int,
    "ongoing": float,
    "upscale_delay_s": float,
    "downscale_delay_s": float,
    "ingresses": int,
    "cpus": float,
    "gpus": float,
}
LOADING: dict[str, Any] = {"threads": int, "memory": str}


def app(arguments: dict[str, Any]) -> Any:
    """The application that `serve run` and a serve.yaml name.

    Args:
        arguments: bundles, "NAME=FOLDER" joined by commas; aliases, "ALIAS=NAME" joined by commas; queue, drain,
            batch_wait_ms, max_body, api_key_file, threads, memory as of `fastvar serve`; replicas and least, the most
            and the fewest of them; ongoing, how many requests a replica is meant to have; upscale_delay_s and
            downscale_delay_s, how long that has to last, as Ray has them; ingresses; cpus and gpus of a replica.

    Raises:
        InputError: one is not known, or not understood.
    """
    known = ("bundles", "aliases", *NUMBERS, *TEXTS, *SCALING, *LOADING)
    if unknown := [name for name in arguments if name not in known]:
        raise InputError(f"argument {unknown[0]!r} is not known", expected=f"some of {', '.join(known)}")
    bundles = read_aliases([part for part in str(arguments.get("bundles", "")).split(",") if part])
    if not bundles:
        raise InputError("no bundles given", expected="bundles=NAME=FOLDER", fix="name one")
    aliases = read_aliases([part for part in str(arguments.get("aliases", "")).split(",") if part])
    if stray := [alias for alias, name in aliases.items() if name not in bundles or alias in bundles]:
        raise InputError(f"alias {stray[0]} does not name a bundle", expected=f"ALIAS=NAME of {', '.join(bundles)}")
    options: dict[str, Any] = {**_read(arguments, NUMBERS), **_read(arguments, dict.fromkeys(TEXTS, str))}
    checked = ServeOptions(**{name: value for name, value in options.items() if name != "api_key_file"})
    load_options, scaling = _read(arguments, LOADING), _read(arguments, SCALING)
    with contextlib.suppress(KeyError):
        load_options["memory_budget"] = load_options.pop("memory")
    replica = Replica.options(  # type: ignore[attr-defined]  # ray's decorator gives a deployment
        # Ours is full first, and says so in a form that clients read; Ray's own refusal is plain text.
        max_ongoing_requests=(checked.queue + 16) * MOST_BUNDLES,
        ray_actor_options={"num_cpus": scaling.get("cpus", 1.0), "num_gpus": scaling.get("gpus", 0.0)},
        autoscaling_config={
            "min_replicas": scaling.get("least", 1),
            "max_replicas": max(scaling.get("replicas", 1), scaling.get("least", 1)),
            "target_ongoing_requests": scaling.get("ongoing", 2.0),
            **{name: scaling[name] for name in ("upscale_delay_s", "downscale_delay_s") if name in scaling},
        },
        health_check_period_s=5,
    )
    options["aliases"] = aliases
    ingress = Ingress.options(num_replicas=scaling.get("ingresses", 1))  # type: ignore[attr-defined]  # the same
    return ingress.bind(replica.bind(bundles, options, load_options), list(bundles), aliases, options)


def _read(arguments: Mapping[str, Any], readers: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by their readers: `serve run` gives text, a serve.yaml numbers too.

    Raises:
        InputError: one is not understood.
    """
    found = {}
    for name, read in readers.items():
        if name in arguments:
            try:
                found[name] = read(arguments[name])
            except (TypeError, ValueError):
                expected = {int: "a whole number", float: "a number"}.get(read, "text")
                raise InputError(f"{name}={arguments[name]!r} not understood", expected=expected) from None
    return found
