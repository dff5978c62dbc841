"""What stands before every endpoint: request ids and the log, keys, limits, the drain.

Plain ASGI: a middleware that reads responses would hold streams back and hide disconnects.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_runtime.server.errors import REQUEST_ID, ApiError
from qwen_runtime.server.lifecycle import Lifecycle
from qwen_runtime.server.metrics import Metrics
from qwen_runtime.server.settings import ServerSettings

__all__ = [
    "ApiKeys",
    "BodyLimit",
    "DrainGate",
    "RequestLog",
    "annotate",
    "middleware_stack",
    "request_id",
]

_LOG = logging.getLogger("qwen_runtime.server")
_FIELDS = "qwen_runtime.log_fields"
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_PROBES = {"/health", "/health/live", "/health/ready"}
_WATCHED = {*_PROBES, "/metrics"}
_OPEN = {*_PROBES, "/", "/openapi.json"}
_NOT_WORK = {*_WATCHED, *_OPEN, "/v1/models"}
_LAST_WORDS_SECONDS = 2.0


def middleware_stack(
    settings: ServerSettings, lifecycle: Lifecycle, metrics: Metrics
) -> list[Middleware]:
    """Everything above, outermost first, for ``Starlette(middleware=...)``."""
    stack = [Middleware(RequestLog, metrics=metrics)]
    if settings.cors_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    if settings.api_keys:
        open_paths = _OPEN if settings.protect_metrics else _OPEN | {"/metrics"}
        stack.append(Middleware(ApiKeys, keys=settings.api_keys, open_paths=open_paths))
    stack.append(Middleware(DrainGate, lifecycle=lifecycle))
    stack.append(Middleware(BodyLimit, max_bytes=settings.max_body_bytes))
    return stack


def request_id(scope: Scope) -> str:
    """The id under which a request is logged and answered."""
    return str(scope[REQUEST_ID])


def annotate(scope: Scope, **fields: int | float | str) -> None:
    """Add fields to the request's line in the log: counts and names, never prompts or keys."""
    scope.setdefault(_FIELDS, {}).update(fields)


class RequestLog:
    """Gives every request an id, one line in the log, and a 500 where its endpoint fails."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        scope[REQUEST_ID] = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        fields: dict[str, Any] = scope.setdefault(_FIELDS, {})
        began, status, whole = time.perf_counter(), 0, False

        async def tagged(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = scope[REQUEST_ID]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, tagged)
        except Exception:
            _LOG.exception("request %s failed", scope[REQUEST_ID])
            if status:
                raise
            failure = "the server failed; its log tells why, under the request's id"
            await _answer(tagged, ApiError(500, failure, kind="server_error"))
        finally:
            # 499 is what proxies log for a client that left before the end of its answer.
            code = status if whole else 499
            self._metrics.responded(code)
            line = {
                "request_id": scope[REQUEST_ID],
                "method": scope["method"],
                # Quoted: a path must not write lines of its own.
                "path": quote(scope["path"][:200]),
                "status": code,
                "ms": round((time.perf_counter() - began) * 1e3, 3),
                **fields,
            }
            # Probes and dashboards ask every second.
            level = logging.DEBUG if _route_path(scope) in _WATCHED else logging.INFO
            text = "%(method)s %(path)s %(status)d %(ms).1f ms"
            _LOG.log(level, text, line, extra={"fields": line})
        return None


class ApiKeys:
    """Asks for ``Authorization: Bearer KEY`` on all paths but those that are open."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], open_paths: set[str]) -> None:
        self.app = app
        # Digests have one length, so that not even a key's length shows in the time it takes.
        self._digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer 401."""
        if scope["type"] != "http" or _route_path(scope) in self._open_paths:
            return await self.app(scope, receive, send)
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._known(key.strip()):
            return await self.app(scope, receive, send)
        missing = "pass one as Authorization: Bearer KEY" if not key else "this one is not known"
        message = f"a request must carry one of the server's API keys: {missing}"
        headers = {"www-authenticate": "Bearer"}
        return await _answer(send, ApiError(401, message, code="invalid_api_key", headers=headers))

    def _known(self, key: str) -> bool:
        digest = hashlib.sha256(key.encode("latin-1")).digest()
        # All are compared: which one it was must not show either.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


class DrainGate:
    """Refuses requests while the model is loaded or drained, and counts those it lets through.

    One that outlives the drain is cancelled and told so: with 503 where nothing was sent yet, with
    an error event in a stream.
    """

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request, or answer 503."""
        if scope["type"] != "http" or _route_path(scope) in _NOT_WORK:
            return await self.app(scope, receive, send)
        refusal = self._lifecycle.refusal()
        if refusal is not None:
            return await _answer(send, _unavailable(refusal))
        started = ended = streams = False

        async def watched(message: Message) -> None:
            nonlocal started, ended, streams
            if message["type"] == "http.response.start":
                started = True
                kind = Headers(raw=message["headers"]).get("content-type", "")
                streams = kind.startswith("text/event-stream")
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        with self._lifecycle.request():
            try:
                await self.app(scope, receive, watched)
            except asyncio.CancelledError:
                cut = self._lifecycle.expired and not ended
                if not cut or (started and not streams):
                    raise
                # The request goes on: a timeout tells its own cancellation by the task's count.
                task = asyncio.current_task()
                assert task is not None
                task.uncancel()
                # A client that reads nothing must not hold the server up.
                async with asyncio.timeout(_LAST_WORDS_SECONDS):
                    await self._last_words(send, started=started)
        return None

    async def _last_words(self, send: Send, *, started: bool) -> None:
        error = _unavailable(self._lifecycle.expiry())
        if not started:
            return await _answer(send, error)
        body = b"data: " + json.dumps(error.document()).encode() + b"\n\n"
        return await send({"type": "http.response.body", "body": body, "more_body": False})


class BodyLimit:
    """Reads a request's body before its endpoint does, and answers 413 where it is too large.

    Bodies are one JSON document each, which needs all of it anyway; so a refusal always comes
    before any work.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request whose body fits."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            return await self._too_large(send)
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return await self._too_large(send)
            more = message.get("more_body", False)
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is None:
                return await receive()
            message, whole = whole, None
            return message

        return await self.app(scope, replay, send)

    async def _too_large(self, send: Send) -> None:
        error = ApiError(
            413,
            f"a request's body must be {self._max_bytes} bytes at most; send less, or start the "
            "server with a larger --max-body-bytes",
            code="request_too_large",
            # What is left of the body would be read as the next request.
            headers={"connection": "close"},
        )
        await _answer(send, error)


def _route_path(scope: Scope) -> str:
    """The path below the mount point, as routes name it."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    if prefix and path.startswith(prefix) and path[len(prefix) :][:1] in ("", "/"):
        path = path[len(prefix) :]
    return path or "/"


def _unavailable(message: str) -> ApiError:
    headers = {"retry-after": "1"}
    return ApiError(503, message, code="server_unavailable", kind="server_error", headers=headers)


async def _answer(send: Send, error: ApiError) -> None:
    body = json.dumps(error.document()).encode()
    head = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **error.headers,
    }
    raw = [(name.encode(), value.encode()) for name, value in head.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
