"""A client of a websocket, of the standard library alone: reads what a server sends (RFC 6455), and sends texts."""

from __future__ import annotations

import base64
import os
import socket
import struct
from types import TracebackType
from urllib.parse import urlsplit

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class WebSocket:
    """A connection. A context manager.

    Args:
        url: "http://HOST:PORT/PATH?QUERY" of the socket.
        timeout: seconds that a message may take to come.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {parts.path}?{parts.query} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
        )
        self._socket.sendall("\r\n".join((*lines, "", "")).encode())
        self._file = self._socket.makefile("rb")
        status = self._file.readline()
        assert b" 101 " in status, status
        while self._file.readline().strip():
            pass

    def send(self, text: str) -> None:
        self._send(TEXT, text.encode())

    def receive(self) -> str | bytes:
        """The next message, a text or bytes.

        Raises:
            TimeoutError: none came.
            ConnectionError: the server has closed.
        """
        whole, kind = b"", 0
        while True:
            first, second = self._read(2)
            length = second & 0x7F
            if length >= 126:
                length = struct.unpack(">H" if length == 126 else ">Q", self._read(2 if length == 126 else 8))[0]
            content, code = self._read(length), first & 0x0F
            if code == CLOSE:
                raise ConnectionError("the server closed the websocket")
            if code == PING:
                self._send(PONG, content)
            elif code != PONG:
                whole, kind = whole + content, code or kind  # 0 goes on with what was begun
                if first & 0x80:
                    return whole.decode() if kind == TEXT else whole

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._socket.close()

    def _read(self, count: int) -> bytes:
        found = self._file.read(count)
        if len(found) < count:
            raise ConnectionError("the websocket ended")
        return found

    def _send(self, code: int, content: bytes) -> None:
        mask = os.urandom(4)
        size = len(content)
        length = struct.pack(">B", 0x80 | size) if size < 126 else struct.pack(">BH", 0x80 | 126, size)
        masked = bytes(byte ^ mask[place % 4] for place, byte in enumerate(content))
        self._socket.sendall(bytes((0x80 | code,)) + length + mask + masked)
