"""HTTP by hand over asyncio: little of a client's own time, and all of its bad manners."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

__all__ = ["Exchange", "ProtocolError", "get_json", "get_text"]

_READ_BYTES = 1 << 16


class ProtocolError(Exception):
    """The server ended a connection before its answer was whole."""


class Exchange:
    """One request and its answer, over a connection of its own.

    Args:
        port: Of the server on 127.0.0.1.
        receive_buffer_bytes: Of the socket; None leaves it to the system. A small one makes the
            server feel that its client does not read.
    """

    def __init__(self, port: int, *, receive_buffer_bytes: int | None = None) -> None:
        self._address = ("127.0.0.1", port)
        self._receive_buffer_bytes = receive_buffer_bytes
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._buffer = bytearray()
        self._chunked = False
        self._left: int | None = None
        self.status = 0
        """HTTP status, once the answer has begun."""

    async def __aenter__(self) -> Self:
        connection = socket.socket()
        if self._receive_buffer_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer_bytes)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, self._address)
        limit = self._receive_buffer_bytes or _READ_BYTES
        self._reader, self._writer = await asyncio.open_connection(sock=connection, limit=limit)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._writer is not None
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def send(
        self, method: str, path: str, body: bytes = b"", *, declared_bytes: int | None = None
    ) -> None:
        """Send a request.

        Args:
            method: Of HTTP.
            path: With its slash.
            body: JSON, or what is to be taken for it.
            declared_bytes: Length to declare in place of the body's.
        """
        assert self._writer is not None
        length = len(body) if declared_bytes is None else declared_bytes
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def pieces(self, *, slow_bytes: int = 0, pause_s: float = 1.0) -> AsyncIterator[bytes]:
        """The answer's body as it comes.

        Args:
            slow_bytes: Bytes that are read one at a time, with a pause after each.
            pause_s: Seconds of that pause.

        Raises:
            ProtocolError: If the connection ends first.
        """
        # One byte in, then the rest: nothing more is taken from the socket meanwhile.
        for _ in range(slow_bytes):
            self._buffer += await self._read(1)
            await asyncio.sleep(pause_s)
        await self._head()
        while self._left != 0:
            piece = await (self._chunk() if self._chunked else self._plain())
            if piece:
                yield piece

    async def events(self, *, slow_bytes: int = 0) -> AsyncIterator[str]:
        """The data of the answer's server-sent events, ``[DONE]`` included."""
        pending = b""
        async for piece in self.pieces(slow_bytes=slow_bytes):
            *events, pending = (pending + piece).split(b"\n\n")
            for event in events:
                yield event.decode().removeprefix("data: ")

    async def body(self, *, slow_bytes: int = 0) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.pieces(slow_bytes=slow_bytes)])

    def abort(self) -> None:
        """Leave at once, without a word to the server."""
        assert self._writer is not None
        self._writer.transport.abort()

    async def _head(self) -> None:
        while b"\r\n\r\n" not in self._buffer:
            self._buffer += await self._read()
        head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
        self._buffer = bytearray(rest)
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        self._chunked = headers.get("transfer-encoding") == "chunked"
        self._left = None if self._chunked else int(headers.get("content-length", 0))

    async def _chunk(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            self._buffer += await self._read()
        size = int(bytes(self._buffer[:end]).split(b";")[0], 16)
        whole = end + 2 + size + 2
        while len(self._buffer) < whole:
            self._buffer += await self._read()
        piece = bytes(self._buffer[end + 2 : whole - 2])
        del self._buffer[:whole]
        if size == 0:
            self._left = 0
        return piece

    async def _plain(self) -> bytes:
        assert self._left is not None
        if not self._buffer:
            self._buffer += await self._read()
        piece = bytes(self._buffer[: self._left])
        self._buffer.clear()
        self._left -= len(piece)
        return piece

    async def _read(self, size: int = _READ_BYTES) -> bytes:
        assert self._reader is not None
        data = await self._reader.read(size)
        if not data:
            raise ProtocolError("the server closed the connection before its answer was whole")
        return data


async def get_text(port: int, path: str) -> str:
    """The body of a GET, whatever its status."""
    async with Exchange(port) as exchange:
        await exchange.send("GET", path)
        return (await exchange.body()).decode()


async def get_json(port: int, path: str) -> dict[str, Any]:
    """The same, read as a JSON object."""
    document: dict[str, Any] = json.loads(await get_text(port, path))
    return document
