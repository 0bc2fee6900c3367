"""What draws on Ray Serve: the application of `fastvar serve` for each bundle that is asked for, without a socket."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.metrics import Gauge
from starlette.responses import Response
from starlette.types import Message

from ..errors import FastvarError
from ..serving.app import app_of
from ..serving.fleet import Fleet
from ..serving.log import Log
from ..serving.metrics import Metrics
from ..serving.model import ServedModel
from ..serving.options import ServeOptions, read_api_keys
from ..serving.wire.answers import ApiError

MOST_BUNDLES = 2  # that a replica keeps loaded
COUNTED_SECONDS = 5.0  # between copies of a replica's numbers into Ray's


def options_of(given: Mapping[str, Any]) -> ServeOptions:
    """Options by plain values; keys are read where they are needed, so that no one else holds them.

    Raises:
        InputError: the keys cannot be read, or a value is out of range.
    """
    plain = {**given}
    file = plain.pop("api_key_file", None)
    return ServeOptions(**plain, api_keys=read_api_keys(Path(file)) if file else ())


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
        options = options_of({**self._options, "aliases": aliases})
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


def _messages(response: Response) -> list[Message]:
    start: Message = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    return [start, {"type": "http.response.body", "body": response.body, "more_body": False}]
