"""What a Ray Serve proxy tells clients whose replica was lost.

By itself the proxy answers a bare 500 then, and breaks a stream off. Both can be told to retry.
The proxies take this module's middleware when their Ray nodes are started with

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=qwen_runtime.deploy.ray_proxy:proxy_middlewares
"""

from __future__ import annotations

import json
from typing import Final

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_runtime.server.errors import ApiError

__all__ = ["LostReplica", "proxy_middlewares"]

_LOST: Final = ApiError(
    503,
    "this request must be sent again, and another replica will take it: its answer was not "
    "finished, because its replica has ended or the proxy's request_timeout_s is over",
    code="server_unavailable",
    kind="server_error",
    headers={"retry-after": "1"},
)


def proxy_middlewares() -> list[Middleware]:
    """The middleware of a proxy, as Serve asks for it."""
    return [Middleware(LostReplica)]


class LostReplica:
    """Ends what the proxy left open because a replica ended in the middle of it.

    A request whose answer had not begun gets a 503 in OpenAI's shape, which its clients try again;
    a stream gets the same error as its last event. Other answers stay as they are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
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

        await self.app(scope, receive, watched)
        if not started:
            return await JSONResponse(_LOST.document(), _LOST.status, _LOST.headers)(
                scope, receive, send
            )
        if streams and not ended:
            # An event of its own, wherever the last one was cut.
            body = b"\n\ndata: " + json.dumps(_LOST.document()).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": body, "more_body": False})
        return None
