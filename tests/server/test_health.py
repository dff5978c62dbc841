"""What probes are told, from loading to the end."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import httpx
from starlette.applications import Starlette

from qwen_runtime import LLM, AsyncLLM
from qwen_runtime.engine import EngineStats
from qwen_runtime.server.health import health_routes
from qwen_runtime.server.lifecycle import Lifecycle
from qwen_runtime.server.metrics import Metrics

STATS = EngineStats(1, 2, 1, 16, 256, 10, 100, 5, 0, 3, 4)


def engine(*, alive: bool = True) -> AsyncLLM:
    """What health reads of a model."""

    async def aclose() -> None:
        pass

    return cast("AsyncLLM", SimpleNamespace(alive=alive, stats=lambda: STATS, aclose=aclose))


async def ask(lifecycle: Lifecycle, path: str) -> httpx.Response:
    app = Starlette(routes=health_routes(lifecycle, Metrics("tiny", lambda: None), "tiny"))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.get(path)


async def statuses(lifecycle: Lifecycle) -> dict[str, int]:
    names = {"all": "/health", "live": "/health/live", "ready": "/health/ready"}
    return {name: (await ask(lifecycle, path)).status_code for name, path in names.items()}


def test_a_loaded_model_is_live_and_ready_and_summed_up() -> None:
    lifecycle = Lifecycle(engine())
    assert asyncio.run(statuses(lifecycle)) == {"all": 200, "live": 200, "ready": 200}
    document: dict[str, Any] = asyncio.run(ask(lifecycle, "/health")).json()
    assert document.pop("uptime_seconds") >= 0
    figures = document.pop("engine")
    assert figures["num_waiting"] == 2
    assert figures["cache_tokens_limit"] == 100
    assert document == {
        "status": "ready",
        "problem": None,
        "model": "tiny",
        "requests_active": 0,
    }


def test_a_model_that_is_being_loaded_is_live_but_not_ready() -> None:
    lifecycle = Lifecycle(engine)
    assert asyncio.run(statuses(lifecycle)) == {"all": 503, "live": 200, "ready": 503}
    document = asyncio.run(ask(lifecycle, "/health")).json()
    assert (document["status"], document["engine"]) == ("loading", None)
    assert "being loaded" in document["problem"]


def test_a_draining_server_is_live_but_not_ready() -> None:
    async def drained() -> dict[str, int]:
        lifecycle = Lifecycle(engine())
        await lifecycle.drain(1)
        return await statuses(lifecycle)

    assert asyncio.run(drained()) == {"all": 503, "live": 200, "ready": 503}


def test_a_model_that_could_not_be_loaded_is_not_live() -> None:
    def fail() -> AsyncLLM:
        raise OSError("no such bundle")

    async def failed() -> dict[str, int]:
        lifecycle = Lifecycle(fail)
        await asyncio.gather(lifecycle.loaded(), return_exceptions=True)
        return await statuses(lifecycle)

    assert asyncio.run(failed()) == {"all": 503, "live": 503, "ready": 503}


def test_an_engine_whose_thread_ended_is_not_live() -> None:
    lifecycle = Lifecycle(engine(alive=False))
    assert asyncio.run(statuses(lifecycle)) == {"all": 503, "live": 503, "ready": 503}
    assert asyncio.run(ask(lifecycle, "/health")).json()["status"] == "failed"


def test_a_real_engine_is_alive_until_it_is_closed(text_llm: LLM) -> None:
    with LLM(text_llm.bundle) as llm:
        lifecycle = Lifecycle(AsyncLLM(llm))
        assert asyncio.run(ask(lifecycle, "/health/live")).status_code == 200
    assert asyncio.run(ask(lifecycle, "/health/live")).status_code == 503


def test_metrics_are_prometheus_text() -> None:
    answer = asyncio.run(ask(Lifecycle(engine()), "/metrics"))
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "qwen:request_success_total" in answer.text
