"""What stands before the endpoints, over a small app of its own."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message

from qwen_runtime import AsyncLLM
from qwen_runtime.server.lifecycle import Lifecycle
from qwen_runtime.server.logs import configure_logging
from qwen_runtime.server.metrics import Metrics
from qwen_runtime.server.middleware import annotate, middleware_stack, request_id
from qwen_runtime.server.settings import ServerSettings

KEYS = ServerSettings(api_keys=("first", "second"))


async def echo(request: Request) -> Response:
    body = await request.body()
    annotate(request.scope, prompt_tokens=len(body))
    return PlainTextResponse(body, headers={"endpoint-id": request_id(request.scope)})


async def broken(_: Request) -> Response:
    raise ZeroDivisionError("the secret of the endpoint")


async def pieces(_: Request) -> Response:
    async def events() -> AsyncIterator[str]:
        for number in range(3):
            yield f"data: {number}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def fine(_: Request) -> Response:
    return JSONResponse({})


def make_app(settings: ServerSettings | None = None) -> Starlette:
    lifecycle = Lifecycle(cast("AsyncLLM", object()))
    metrics = Metrics("tiny", lambda: None)
    routes = [
        Route("/v1/chat/completions", echo, methods=["POST"]),
        Route("/tokenize", echo, methods=["POST"]),
        Route("/v1/broken", broken),
        Route("/v1/pieces", pieces),
        *(Route(path, fine) for path in ("/", "/health", "/health/live", "/health/ready")),
        *(Route(path, fine) for path in ("/metrics", "/v1/models")),
    ]
    app = Starlette(
        routes=routes,
        middleware=middleware_stack(settings or ServerSettings(), lifecycle, metrics),
    )
    app.state.lifecycle, app.state.metrics = lifecycle, metrics
    return app


def ask(app: ASGIApp, method: str, path: str, **arguments: Any) -> httpx.Response:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **arguments)

    return asyncio.run(request())


def fields_of(caplog: pytest.LogCaptureFixture) -> dict[str, Any]:
    (record,) = [record for record in caplog.records if hasattr(record, "fields")]
    return dict(record.fields)


@pytest.mark.parametrize("given", ["abc-1.2_3", "x" * 128])
def test_a_sane_request_id_is_kept(given: str) -> None:
    answer = ask(make_app(), "POST", "/tokenize", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == answer.headers["endpoint-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "é"])
def test_another_request_id_is_replaced(given: str) -> None:
    header = {"x-request-id": given.encode()}
    ids = {
        ask(make_app(), "POST", "/tokenize", headers=header).headers["x-request-id"]
        for _ in range(2)
    }
    assert len(ids) == 2
    assert all(len(each) == 32 and each.isalnum() for each in ids)


def test_a_request_is_one_line_of_json_without_prompt_or_key(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("qwen_runtime", "uvicorn")
    before = [
        (logger, logger.handlers, logger.level, logger.propagate)
        for logger in map(logging.getLogger, names)
    ]
    try:
        configure_logging("json")
        ask(
            make_app(KEYS),
            "POST",
            "/tokenize?key=second",
            content=b"my prompt",
            headers={"authorization": "Bearer second", "x-request-id": "r1"},
        )
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers, logger.level, logger.propagate = handlers, level, propagate
    (line,) = capsys.readouterr().err.splitlines()
    document = json.loads(line)
    assert document.pop("ms") >= 0
    assert document.pop("time").endswith("+00:00")
    assert document.pop("message").startswith("POST /tokenize 200 ")
    assert document == {
        "level": "info",
        "request_id": "r1",
        "method": "POST",
        "path": "/tokenize",
        "status": 200,
        "prompt_tokens": 9,
    }


def test_a_path_cannot_write_lines_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qwen_runtime.server")
    ask(make_app(), "GET", "/v1/%0Aforged line")
    assert fields_of(caplog)["path"] == "/v1/%0Aforged%20line"
    assert "\n" not in caplog.text.rstrip("\n")


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics"])
def test_what_is_asked_every_second_is_logged_for_debugging_only(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "qwen_runtime.server")
    ask(make_app(), "GET", path)
    assert [record.levelno for record in caplog.records if hasattr(record, "fields")] == [
        logging.DEBUG
    ]


def test_a_broken_endpoint_is_an_error_of_openai_s_shape_and_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "qwen_runtime.server")
    app = make_app()
    answer = ask(app, "GET", "/v1/broken", headers={"x-request-id": "r2"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "r2"
    error = answer.json()["error"]
    assert error["type"] == "server_error"
    assert "secret" not in answer.text
    assert "ZeroDivisionError: the secret of the endpoint" in caplog.text
    assert fields_of(caplog)["status"] == 500
    assert b'qwen:http_responses_total{status="500"} 1.0' in app.state.metrics.render("")[0]


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/tokenize", "/v1/unknown", "/v1/models"]
)
@pytest.mark.parametrize(
    "header", [None, "Bearer third", "Bearer ", "Basic first", "first", "Bearer fir", "Bearer é"]
)
def test_no_key_or_a_wrong_one_is_401(path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    answer = ask(make_app(KEYS), "POST", path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "third" not in answer.text


@pytest.mark.parametrize("header", ["Bearer first", "bearer second", "Bearer  second "])
def test_every_key_opens(header: str) -> None:
    answer = ask(make_app(KEYS), "POST", "/tokenize", headers={"authorization": header})
    assert answer.status_code == 200


def test_health_and_page_are_open_and_metrics_as_set() -> None:
    for path in ("/", "/health", "/health/live", "/health/ready", "/metrics"):
        assert ask(make_app(KEYS), "GET", path).status_code == 200, path
    protected = make_app(ServerSettings(api_keys=("first",), protect_metrics=True))
    assert ask(protected, "GET", "/metrics").status_code == 401
    assert ask(protected, "GET", "/health").status_code == 200


def test_keys_hold_under_a_mount_point() -> None:
    outer = Starlette(routes=[Mount("/llm", make_app(KEYS))])
    assert ask(outer, "POST", "/llm/tokenize").status_code == 401
    assert ask(outer, "GET", "/llm/health").status_code == 200
    # A mount point that is named like an open path opens nothing.
    outer = Starlette(routes=[Mount("/health", make_app(KEYS))])
    assert ask(outer, "POST", "/health/tokenize").status_code == 401


@pytest.mark.parametrize("streamed", [False, True])
def test_a_body_may_be_as_large_as_the_limit_and_no_larger(streamed: bool) -> None:
    app = make_app(ServerSettings(max_body_bytes=100))

    def content(size: int) -> Any:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(size):
                yield b"x"

        return parts() if streamed else b"x" * size

    assert ask(app, "POST", "/tokenize", content=content(100)).text == "x" * 100
    answer = ask(app, "POST", "/tokenize", content=content(101))
    assert answer.status_code == 413
    assert "must be 100 bytes at most" in answer.json()["error"]["message"]
    assert answer.headers["connection"] == "close"


def test_a_client_that_leaves_while_it_sends_reaches_no_endpoint() -> None:
    called = False

    async def endpoint(*_: object) -> None:
        nonlocal called
        called = True

    (*_, limit) = middleware_stack(
        ServerSettings(), Lifecycle(cast("AsyncLLM", object())), Metrics("tiny", lambda: None)
    )
    messages: list[Message] = [
        {"type": "http.request", "body": b"{", "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(_: Message) -> None:
        raise AssertionError("nobody listens")

    app = limit.cls(endpoint, *limit.args, **limit.kwargs)
    scope = {"type": "http", "method": "POST", "headers": []}
    asyncio.run(cast("Callable[..., Awaitable[None]]", app)(scope, receive, send))
    assert not called
    assert not messages


def test_cors_is_off_until_an_origin_is_named() -> None:
    origin = {"origin": "https://a.example"}
    answer = ask(make_app(), "GET", "/v1/models", headers=origin)
    assert "access-control-allow-origin" not in answer.headers
    app = make_app(ServerSettings(cors_origins=("https://a.example",), api_keys=("first",)))
    preflight = ask(
        app,
        "OPTIONS",
        "/v1/chat/completions",
        headers={
            **origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    # A page must be able to read why it was refused.
    refused = ask(app, "POST", "/tokenize", headers=origin)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    other = ask(app, "GET", "/health", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


def test_streams_pass_piece_by_piece() -> None:
    sent: list[bytes] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message.get("body", b""))

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v1/pieces",
        "query_string": b"",
        "headers": [],
        "asgi": {"version": "3.0", "spec_version": "2.4"},
    }
    asyncio.run(make_app()(scope, receive, send))
    assert [piece for piece in sent if piece] == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]
