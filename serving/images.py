"""The two endpoints that draw: a request is read, put in line, and answered whole or scale by scale."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import FastvarError
from ..profiling.formatting import pixels
from ..runtime.output import GeneratedImage
from .fleet import Fleet
from .jobs import Failed, Finished, Job, Moved, News, Scale
from .model import ServedModel
from .wire import answers
from .wire.answers import ApiError, json_response
from .wire.encoding import milliseconds, usage
from .wire.reading import Asked, checked, read_body, takes_images

Result = TypeVar("Result")


class ClientGone(Exception):  # noqa: N818  no error: there is nobody to tell
    """The client has closed the connection."""


class Drawing:
    """One request of a client, from its place in line to its last image."""

    def __init__(self, fleet: Fleet, model: ServedModel, asked: Asked, log: dict[str, Any]) -> None:
        self._fleet, self._model, self.asked, self._log = fleet, model, asked, log
        assert model.pipe is not None
        self._pipe = model.pipe
        self._digest = model.pipe.bundle.digest
        self._size = pixels(self._pipe.size)
        self.job = Job(asked.requests, asked.watched, asked.streams, self._encoded, asked.encoding.preview)
        model.submit(self.job)

    async def news(self, heartbeat: float) -> AsyncIterator[News | None]:
        """What becomes of it, to the last image; None where there is nothing to tell for so many seconds."""
        left = len(self.asked.requests)
        while left:
            try:
                news = await asyncio.wait_for(self.job.news.get(), heartbeat)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(news, Failed):
                raise news.error if isinstance(news.error, ApiError) else self._failed(news.error)
            left -= isinstance(news, Finished)
            yield news

    def _failed(self, error: Exception) -> ApiError:
        told = answers.failed(error)
        if told.code == "internal_error":
            self._fleet.log.bug(error, self._log)
        return told

    async def answered(self, receive: Receive, answer: Coroutine[Any, Any, Result]) -> Result:
        """The answer's result; when it is over, or its client is gone, nothing more is drawn."""
        try:
            return await unless_gone(receive, answer)
        except ClientGone:
            self._leave(gone=True)
            raise
        finally:
            self._leave()

    def _leave(self, gone: bool = False) -> None:
        stage = self._model.cancel(self.job) or ("sending" if gone else "")
        if stage:
            self._log["cancelled"] = stage
            self._fleet.metrics.cancelled.labels(self._model.name, stage).inc()

    def _encoded(self, image: GeneratedImage) -> dict[str, Any]:
        """An image as it goes into an answer, its numbers beside it."""
        try:
            data = self.asked.encoding.image(image, self._digest)
        except FastvarError as error:
            raise answers.refused(error, {}) from error
        return {"b64_json": data, "seed": image.seed, "settings": image.settings}

    @property
    def facts(self) -> dict[str, Any]:
        found = {
            "background": "opaque",
            "output_format": self.asked.encoding.format.name,
            "size": self._size,
            "model": self._model.name,
        }
        warnings = [f"the tokenizer does not know: {word}" for word in self.asked.unknown]
        return found | ({"warnings": warnings} if warnings else {})

    @property
    def usage(self) -> dict[str, Any]:
        return usage(self.asked.requests, self._pipe.manifest.plan)

    @property
    def usage_of_one(self) -> dict[str, Any]:
        return usage(self.asked.requests[:1], self._pipe.manifest.plan)

    @property
    def scales(self) -> int:
        return len(self._pipe.manifest.plan.schedule)

    async def whole(self) -> Response:
        """All images in one answer."""
        images: dict[int, dict[str, Any]] = {}
        timings = dict[str, float]()
        async for news in self.news(self._fleet.options.heartbeat):
            if isinstance(news, Finished):
                images[news.place] = news.encoded
                timings = milliseconds(news.image.timings, self.job.queue_ms)
        body = {
            "created": int(time.time()),
            "data": [images[place] for place in sorted(images)],
            **self.facts,
            "usage": self.usage,
        }
        parts = (f"{name};dur={ms:.2f}" for name, ms in timings.items())
        return json_response(body, headers={"server-timing": ", ".join(parts)})

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream, as OpenAI's clients read them; the place in the queue is a comment."""
        kind = "image_edit" if self.asked.is_edit else "image_generation"
        facts = {"quality": "auto", **self.facts}
        shown = dict.fromkeys(range(len(self.asked.requests)), 0)
        async for news in self.news(self._fleet.options.heartbeat):
            now = {"created_at": int(time.time())}
            if news is None:
                yield b": wait\n\n"
            elif isinstance(news, Moved):
                yield f": queue {news.ahead}\n\n".encode()
            elif isinstance(news, Scale):
                data = news.encoded or await asyncio.to_thread(self.asked.encoding.preview, news.event)
                partial = {"type": f"{kind}.partial_image", "b64_json": data, **now, **facts}
                index = {"partial_image_index": shown[news.place], "image": news.place}
                yield event(partial | index | _scale(news, self.scales))
                shown[news.place] += 1
            elif isinstance(news, Finished):
                done = {"type": f"{kind}.completed", **news.encoded, **now, **facts}
                times = milliseconds(news.image.timings, self.job.queue_ms)
                own = {"image": news.place, "timings": times, "usage": self.usage_of_one}
                yield event(done | own)


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event. It has no id: clients take a comment behind one for an empty event."""
    name = data.get("type", "error")
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=True, allow_nan=False)}\n\n".encode()


def _scale(news: Scale, of: int) -> dict[str, Any]:
    own = news.event
    height, width = own.size
    return {
        "scale": own.index,
        "of": of,
        "grid": [height, width],
        "tokens": own.tokens,
        "kept": own.kept,
        "ms": round(own.ms, 3),
    }


class EventStream(Response):
    """Sends events as they come, until the last one, an error, or until the client is gone."""

    def __init__(self, drawing: Drawing) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._drawing = drawing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._drawing.answered(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for part in self._drawing.events():
                await send({"type": "http.response.body", "body": part, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.body), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result, unless the client closes the connection before: then the work is cancelled.

    Raises:
        ClientGone: it did.
    """
    doing, watching = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientGone
    finally:
        for task in (doing, watching):
            task.cancel()
        await asyncio.gather(doing, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def draw(request: Request) -> Response:
    """POST /v1/images/generations and /v1/images/edits."""
    fleet: Fleet = request.app.state.fleet
    log: dict[str, Any] = request.scope["fastvar.log"]
    fleet.check_open()
    fields, files = await read_body(request)
    model = fleet.model_named(fields.get("model"))
    log |= {"model": model.name, "n": fields.get("n", 1), "stream": fields.get("stream", False)}
    if fleet.options.log_prompts:
        log |= {name: fields[name] for name in ("prompt", "negative_prompt", "class_label") if name in fields}
    model.check_room()
    assert model.pipe is not None
    asked = await asyncio.to_thread(checked, model.pipe, fields, files, takes_images(request.url.path))
    drawing = Drawing(fleet, model, asked, log)
    if asked.streams:
        return EventStream(drawing)
    return await drawing.answered(request.receive, drawing.whole())
