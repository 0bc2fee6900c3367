"""What every request passes first: its identity, who asks, how much it sends and how slowly. Errors become answers."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .fleet import Fleet
from .images import ClientGone
from .wire import answers
from .wire.answers import ApiError
from .wire.reading import takes_images

JSON_BYTES = 1 << 20  # of a body without images
SLOWEST = 1 << 16  # bytes a second that a client must send, once its patience is used up
AT_ONCE = 4  # bodies of full length that are held at the same time
DRAINED = 4  # lengths of a body that are read and dropped, so that its sender hears why it was refused
IDENTITY = re.compile(r"[\x21-\x7e]{1,128}")
CLIENT_GONE = 499  # in log and metrics: nobody was left to answer
OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json")
KNOWN = (*OPEN, "/v1/images/generations", "/v1/images/edits", "/v1/models")


class Guard:
    """Middleware, the outermost but for Starlette's own. Every error becomes an answer here."""

    def __init__(self, app: ASGIApp, fleet: Fleet) -> None:
        self._app, self._fleet = app, fleet
        self._reserved = 0  # bytes of bodies with images that are being read or used
        self._keys = [key.encode() for key in fleet.options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        identity = given if IDENTITY.fullmatch(given) else uuid.uuid4().hex
        scope["fastvar.log"] = log = {"request_id": identity, "method": scope["method"], "path": scope["path"][:200]}
        answer = _Answer(send, identity, self._fleet.options.patience)
        begun, self._fleet.answering = time.monotonic(), self._fleet.answering + 1
        body = _Body(receive, self._limit(scope["path"]), self._fleet.options.patience)
        try:
            await self._answered(scope, headers, body, answer)
        finally:
            self._fleet.answering -= 1
            self._note(scope, log, answer.status, begun)

    def _limit(self, path: str) -> int:
        limit = self._fleet.options.body_limit
        return limit if takes_images(path) else min(limit, JSON_BYTES)

    async def _answered(self, scope: Scope, headers: Headers, body: _Body, answer: _Answer) -> None:
        reserved = 0
        try:
            self._check(scope, headers)
            length = body.announced(headers)
            if takes_images(scope["path"]):
                reserved = self._reserve(length)
            await self._app(scope, body.receive, answer.send)
        except ClientGone:
            answer.status = CLIENT_GONE
        except ApiError as error:
            await self._tell(error, scope, body, answer)
        except Exception as error:  # noqa: BLE001  a bug: its traceback goes into the log, not to the client
            self._fleet.log.bug(error, scope["fastvar.log"])
            await self._tell(answers.failed(error), scope, body, answer)
        finally:
            self._reserved -= reserved

    async def _tell(self, error: ApiError, scope: Scope, body: _Body, answer: _Answer) -> None:
        if answer.status:  # it has begun: all that is left is to end it
            raise error
        scope["fastvar.log"]["code"] = error.code
        try:
            await error.response(scope, body.receive, answer.send)
            await body.drop()
        except ClientGone:
            answer.status = CLIENT_GONE

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises ApiError where the client may not ask."""
        if scope["method"] == "POST" and headers.get("sec-fetch-site") == "cross-site":
            expected = "the server's own page, or a program"
            raise ApiError(403, "cross_site", "a page of another site asks", expected=expected)
        if not self._keys or scope["path"] in OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode(errors="replace")
        fits = [hmac.compare_digest(given, own) for own in self._keys]  # all of them: no early answer tells which
        if scheme.lower() != "bearer" or not any(fits):
            raise ApiError(
                401,
                "invalid_api_key",
                "the API key is missing or unknown",
                expected="Authorization: Bearer KEY",
                fix="ask who runs the server",
                headers={"www-authenticate": "Bearer"},
            )

    def _reserve(self, length: int) -> int:
        if self._reserved and self._reserved + length > AT_ONCE * self._fleet.options.body_limit:
            raise answers.queue_full(self._fleet.answering, 1.0)
        self._reserved += length
        return length

    def _note(self, scope: Scope, log: dict[str, Any], status: int, begun: float) -> None:
        model = log.get("model", "")
        path = scope["path"]
        endpoint = path if path in KNOWN else "/v1/models/{model}" if path.startswith("/v1/models/") else "other"
        self._fleet.metrics.requests.labels(endpoint, model, str(status)).inc()
        if path.startswith("/v1/") or status >= 400:
            milliseconds = round((time.monotonic() - begun) * 1e3, 1)
            self._fleet.log.entry("request", {**log, "status": status, "ms": milliseconds})


class _Answer:
    """Sends an answer: with the request's identity, and only to a client that takes it."""

    def __init__(self, send: Send, identity: str, patience: float) -> None:
        self._send, self._identity, self._patience = send, identity, patience
        self.status = 0  # none yet

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._identity
        try:
            await asyncio.wait_for(self._send(message), self._patience)
        except (asyncio.TimeoutError, OSError):
            raise ClientGone from None


class _Body:
    """Receives a body, of so many bytes at most, and not too slowly."""

    def __init__(self, receive: Receive, limit: int, patience: float) -> None:
        self._receive, self._limit, self._patience = receive, limit, patience
        self._length, self._began, self._is_whole = 0, 0.0, False

    def announced(self, headers: Headers) -> int:
        """Bytes that will come, the limit where the client does not say.

        Raises:
            ApiError: more than the limit.
        """
        text = headers.get("content-length", "")
        length = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else self._limit
        if length > self._limit:
            raise self._too_large(length)
        return length

    def _too_large(self, length: int) -> ApiError:
        return answers.body_too_large(f"{length} bytes or more", self._limit)

    async def receive(self) -> Message:
        if self._is_whole:
            return await self._receive()
        self._began = self._began or time.monotonic()
        left = self._began + self._patience + self._length / SLOWEST - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except asyncio.TimeoutError:
            self._is_whole = True  # no more of it is awaited
            headers = {"connection": "close"}
            problem, fix = "the body came too slowly", "send it again"
            raise ApiError(408, "request_timeout", problem, fix=fix, headers=headers) from None
        if message["type"] == "http.disconnect":
            self._is_whole = True
            raise ClientGone
        self._length += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._length > self._limit:
            raise self._too_large(self._length)
        return message

    async def drop(self) -> None:
        """Read what is still coming, within reason: a client hears the answer when it has sent all."""
        end, most = time.monotonic() + self._patience, self._length + DRAINED * self._limit
        while not self._is_whole and self._length < most and (left := end - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(self._receive(), left)
            except asyncio.TimeoutError:
                return
            self._length += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
