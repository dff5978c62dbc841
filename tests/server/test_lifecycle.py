"""From loading to the end of the drain, in one process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message

from qwen_runtime import AsyncLLM
from qwen_runtime.server.lifecycle import Lifecycle, NotReadyError
from qwen_runtime.server.metrics import Metrics
from qwen_runtime.server.middleware import middleware_stack
from qwen_runtime.server.settings import ServerSettings


class FakeLLM:
    """Knows only whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    async def aclose(self) -> None:
        self.closed = True


def fake() -> AsyncLLM:
    return cast("AsyncLLM", FakeLLM())


def closed(llm: AsyncLLM) -> bool:
    return cast("FakeLLM", llm).closed


def test_a_model_that_was_given_is_ready_at_once_and_not_closed() -> None:
    async def live() -> None:
        llm = fake()
        lifecycle = Lifecycle(llm)
        assert (lifecycle.phase, lifecycle.llm) == ("ready", llm)
        await lifecycle.start()
        assert await lifecycle.loaded() is llm
        await lifecycle.stop()
        assert not closed(llm)
        assert lifecycle.refusal() == "the server has stopped; send the request to another one"

    asyncio.run(live())


def test_a_model_is_loaded_beside_the_loop_and_closed_in_the_end() -> None:
    go_on = threading.Event()
    llm = fake()

    def load() -> AsyncLLM:
        assert go_on.wait(5)
        return llm

    async def live() -> None:
        lifecycle = Lifecycle(load)
        await lifecycle.start()
        await lifecycle.start()
        assert lifecycle.phase == "loading"
        with pytest.raises(NotReadyError, match="the model is being loaded"):
            _ = lifecycle.llm
        go_on.set()
        assert await lifecycle.loaded() is llm
        assert (lifecycle.phase, lifecycle.refusal()) == ("ready", None)
        await lifecycle.stop()
        assert closed(llm)

    asyncio.run(live())


def test_a_model_that_is_loaded_after_the_stop_is_closed_too() -> None:
    go_on = threading.Event()
    llm = fake()

    def load() -> AsyncLLM:
        assert go_on.wait(5)
        return llm

    async def live() -> None:
        lifecycle = Lifecycle(load)
        await lifecycle.start()
        stopping = asyncio.create_task(lifecycle.stop())
        await asyncio.sleep(0)
        go_on.set()
        await stopping
        assert (lifecycle.phase, closed(llm)) == ("stopped", True)

    asyncio.run(live())


def test_what_loading_raises_is_told_to_who_waits() -> None:
    def load() -> AsyncLLM:
        raise ValueError("no such bundle")

    async def live() -> None:
        lifecycle = Lifecycle(load)
        with pytest.raises(ValueError, match="no such bundle"):
            await lifecycle.loaded()
        assert lifecycle.phase == "failed"
        with pytest.raises(NotReadyError, match="the model could not be loaded"):
            _ = lifecycle.llm
        await lifecycle.stop()

    asyncio.run(live())


def test_a_failure_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> AsyncLLM:
        raise ValueError("no such bundle")

    async def live() -> None:
        lifecycle = Lifecycle(load)
        await lifecycle.start()
        await lifecycle.stop()

    asyncio.run(live())
    assert "the model could not be loaded" in caplog.text
    assert "ValueError: no such bundle" in caplog.text


def make_app(go_on: asyncio.Event) -> Starlette:
    """Endpoints that wait, before their first byte or after it."""

    async def late(_: Request) -> Response:
        await go_on.wait()
        return PlainTextResponse("done")

    async def stream(_: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            yield "data: 1\n\n"
            await go_on.wait()
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    lifecycle = Lifecycle(fake())
    metrics = Metrics("tiny", lambda: None)
    app = Starlette(
        routes=[Route("/v1/late", late), Route("/v1/stream", stream)],
        middleware=middleware_stack(ServerSettings(), lifecycle, metrics),
    )
    app.state.lifecycle = lifecycle
    return app


async def get(app: Starlette, path: str) -> httpx.Response:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://test"
    ) as client:
        return await client.get(path)


async def active(lifecycle: Lifecycle, number: int) -> None:
    """Wait until so many requests run."""
    async with asyncio.timeout(5):
        while lifecycle.num_active != number:
            await asyncio.sleep(0.001)


def test_a_drain_lets_running_requests_end_and_takes_no_new_ones() -> None:
    async def live() -> None:
        go_on = asyncio.Event()
        app = make_app(go_on)
        lifecycle = app.state.lifecycle
        running = [asyncio.create_task(get(app, f"/v1/{name}")) for name in ("late", "stream")]
        await active(lifecycle, 2)
        drained = asyncio.create_task(lifecycle.drain(5))
        await asyncio.sleep(0)
        refused = await get(app, "/v1/late")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "server_unavailable"
        assert not drained.done()
        go_on.set()
        assert await drained
        late, stream = await asyncio.gather(*running)
        assert late.text == "done"
        assert stream.text == "data: 1\n\ndata: [DONE]\n\n"
        assert not lifecycle.expired

    asyncio.run(live())


def test_a_drain_of_no_time_succeeds_where_nothing_runs() -> None:
    lifecycle = Lifecycle(fake())
    assert asyncio.run(lifecycle.drain(0))
    assert not lifecycle.expired


def test_requests_that_outlive_the_drain_get_an_error_of_their_kind() -> None:
    async def live() -> None:
        app = make_app(asyncio.Event())
        lifecycle = app.state.lifecycle
        running = [asyncio.create_task(get(app, f"/v1/{name}")) for name in ("late", "stream")]
        await active(lifecycle, 2)
        await asyncio.sleep(0.05)  # the stream's first event is on its way
        assert not await lifecycle.drain(0.05)
        async with asyncio.timeout(5):
            late, stream = await asyncio.gather(*running)
        assert late.status_code == 503
        message = "its 0.05 s for running requests are over"
        assert message in late.json()["error"]["message"]
        first, error, end = stream.text.split("\n\n")
        assert (first, end) == ("data: 1", "")
        assert error.startswith('data: {"error": {"message": "the server stopped before')
        assert message in error
        assert lifecycle.num_active == 0

    asyncio.run(live())


def test_a_client_that_reads_nothing_does_not_hold_the_end_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qwen_runtime.server.middleware._LAST_WORDS_SECONDS", 0.05)

    async def live() -> None:
        app = make_app(asyncio.Event())
        stuck = asyncio.Event()

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            if message.get("body"):
                stuck.set()
                await asyncio.Event().wait()

        scope = {
            "type": "http",
            "method": "GET",
            "path": "/v1/stream",
            "query_string": b"",
            "headers": [],
            "asgi": {"version": "3.0", "spec_version": "2.4"},
        }
        request = asyncio.create_task(cast("Any", app)(scope, receive, send))
        await stuck.wait()
        assert not await app.state.lifecycle.drain(0)
        await asyncio.wait({request}, timeout=5)
        assert request.done()
        assert isinstance(request.exception(), TimeoutError)
        assert app.state.lifecycle.num_active == 0

    asyncio.run(live())


def test_a_request_cancelled_for_another_reason_stays_cancelled() -> None:
    async def live() -> None:
        app = make_app(asyncio.Event())
        request = asyncio.create_task(get(app, "/v1/late"))
        await active(app.state.lifecycle, 1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await request
        assert app.state.lifecycle.num_active == 0

    asyncio.run(live())
