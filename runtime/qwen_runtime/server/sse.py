"""Answers that stop when nobody waits for them, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen_runtime.server.errors import api_error, error_response
from qwen_runtime.server.middleware import annotate

__all__ = ["EventStream", "while_connected"]

T = TypeVar("T")

_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Line ends beside those that JSON escapes anyway, by their escapes."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, and cancel it when the client leaves.

    Args:
        receive: The request's channel, its body already read.
        work: What to run.

    Raises:
        ClientDisconnect: If the client left first.
    """
    running = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            return running.result()
        raise ClientDisconnect
    finally:
        watching.cancel()
        running.cancel()
        await asyncio.gather(running, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of JSON events that ends with ``[DONE]``.

    An error before the first event is an answer of its own status; a later one is an event with
    the error's object, the stream's last.

    Args:
        events: What to send; closed at the end, or when the client leaves.
        counts: Called at the end for what the log shall say of it.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[dict[str, Any], None], counts: Callable[[], dict[str, int]]
    ) -> None:
        # nginx holds events back unless it is told not to.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        with contextlib.suppress(ClientDisconnect):
            await while_connected(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            async for event in self._events:
                if not started:
                    await self._start(send)
                    started = True
                await self._write(send, json.dumps(event, ensure_ascii=False))
        except Exception as error:  # noqa: BLE001 - the client must hear of it
            if not started:
                return await error_response(error, scope)(scope, receive, send)
            document = api_error(error, scope).document()
            await self._write(send, json.dumps(document), more=False)
        else:
            await self._write(send, "[DONE]", more=False)
        finally:
            await self._events.aclose()
            annotate(scope, **self._counts())
        return None

    async def _start(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )

    @staticmethod
    def _write(send: Send, data: str, *, more: bool = True) -> Awaitable[None]:
        if not data.isascii():
            # Readers that split lines as Unicode does would cut an event at these.
            data = data.translate(_LINE_ENDS)
        body = f"data: {data}\n\n".encode()
        return send({"type": "http.response.body", "body": body, "more_body": more})
