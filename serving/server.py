"""An application on a socket, from start to a quiet end: signals, time limits of connections, and the one process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import InputError
from ..profiling.formatting import pixels
from .app import create_app
from .fleet import Fleet
from .log import Log, LogHandler
from .model import ServedModel
from .options import ServeOptions

SAME_REQUEST_SECONDS = 1.0  # within these a second signal is the first one
SWITCH_SECONDS = 0.0005  # after which whoever answers lets the drawing thread launch its next engine
KEPT_ALIVE = 75  # seconds between requests: longer than clients wait that were told to come again
GOODBYE = 3  # seconds for connections to close when all is answered


def serve(
    bundles: Mapping[str, Path],
    options: ServeOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    log: Log | None = None,
    told: Callable[[str], object] = print,
    **load_options: Any,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        bundles: folders by the names that clients ask for.
        host, port: where; port 0 is any that is free.
        told: gets a line when the server listens, and one for each bundle that is loaded.
        load_options: arguments of `Pipeline.load`.

    Raises:
        InputError: the address cannot be had, or an alias stands for no model.
        FastvarError: a bundle cannot be loaded.
    """
    log = log or Log()
    failures: list[Exception] = []

    def loaded(model: ServedModel) -> None:
        if model.failure is not None:
            failures.append(model.failure)
            server.should_exit = True
        elif model.pipe is not None:
            beside = f", {model.instances} side by side" if model.instances > 1 else ""
            told(f"loaded {model.name}: {pixels(model.pipe.size)}, {model.pipe.manifest.plan.policy.name}{beside}")

    app = create_app(bundles, options, loaded=loaded, log=log, **load_options)
    with contextlib.closing(_bound(host, port)) as bound:
        address = bound.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        server = _Server(app, options)
        told(f"listening on http://{shown}:{address[1]}")
        sys.setswitchinterval(SWITCH_SECONDS)
        with _logged(log):
            server.run(sockets=[bound])
    if failures:
        raise failures[0]


def _bound(host: str, port: int) -> socket.socket:
    """A socket at that address.

    Raises:
        InputError: it cannot be had.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, number)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen on {host}:{port}: {reason}",
            expected="an address of this machine, and a port that is free",
            fix="choose another --port, or end what uses it",
        ) from error
    return bound


@contextlib.contextmanager
def _logged(log: Log) -> Iterator[None]:
    """Warnings and errors of libraries go into the log as well."""
    handler, root = LogHandler(log), logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


class _Server(uvicorn.Server):
    """Ends in two steps: first all is drawn that has begun, then the connections are closed."""

    def __init__(self, app: Starlette, options: ServeOptions) -> None:
        config = uvicorn.Config(
            app,
            http=_protocol(options.patience),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GOODBYE,
            timeout_keep_alive=KEPT_ALIVE,
        )
        super().__init__(config)
        self._fleet: Fleet = app.state.fleet
        self._asked_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would raise the signal again when all is done: the process would seem to have been killed."""
        numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT") if hasattr(signal, name)]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at and now - self._asked_at >= SAME_REQUEST_SECONDS:
            self.force_exit = self.should_exit = True
        elif not self._asked_at:
            self._asked_at = now
            if self._loop is None:
                self.should_exit = True
            else:
                self._loop.call_soon_threadsafe(self._begin_to_drain)

    def _begin_to_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self._fleet.drain()
        finally:
            self.should_exit = True


def _protocol(patience: float) -> type[H11Protocol]:
    """HTTP whose connections are closed when no request has come through in so many seconds."""

    class Patient(H11Protocol):
        _head_due: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._expect_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._head_due is None and not self._is_answering:
                self._expect_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._expect_nothing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._expect_nothing()
            super().connection_lost(exc)

        @property
        def _is_answering(self) -> bool:
            cycle: Any = self.cycle  # None before the first request
            return cycle is not None and not cycle.response_complete

        def _expect_request(self) -> None:
            self._head_due = self.loop.call_later(patience, self._give_up)

        def _expect_nothing(self) -> None:
            """Between requests uvicorn's own limit holds."""
            if self._head_due is not None:
                self._head_due.cancel()
                self._head_due = None

        def _give_up(self) -> None:
            """Whatever was sent so far is no request."""
            self._head_due = None
            if not self._is_answering and not self.transport.is_closing():
                self.transport.close()

    return Patient
