"""What a proxy's middleware sends where a replica left an answer open."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_runtime.deploy.ray_proxy import LostReplica, proxy_middlewares


def answer(app: ASGIApp) -> httpx.Response:
    """What a client gets of an app behind the middleware."""
    import anyio

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(LostReplica(app))
        async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
            return await client.get("/")

    return anyio.run(ask)


def proxy(kind: str | None, *bodies: bytes, whole: bool) -> ASGIApp:
    """A proxy that sends this much of an answer and returns, as Serve's does."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if kind is None:
            return
        headers = [(b"content-type", kind.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for index, body in enumerate(bodies):
            more = not whole or index < len(bodies) - 1
            await send({"type": "http.response.body", "body": body, "more_body": more})

    return app


def test_an_answer_that_never_began_becomes_a_503_that_clients_retry() -> None:
    response = answer(proxy(None, whole=False))

    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"]["code"] == "server_unavailable"
    assert "must be sent again" in response.json()["error"]["message"]


def test_a_stream_that_was_cut_ends_with_an_error_event_of_its_own() -> None:
    response = answer(proxy("text/event-stream; charset=utf-8", b"data: {}\n\ndata", whole=False))

    first, broken, last, rest = response.text.split("\n\n")
    assert (first, broken, rest) == ("data: {}", "data", "")
    assert last.startswith('data: {"error": {"message": "this request must be')


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
def test_whole_answers_stay_as_they_are(kind: str) -> None:
    assert answer(proxy(kind, b"data: ", b"[DONE]\n\n", whole=True)).text == "data: [DONE]\n\n"


def test_serve_finds_the_middleware_under_its_name() -> None:
    (middleware,) = proxy_middlewares()

    assert middleware.cls is LostReplica
