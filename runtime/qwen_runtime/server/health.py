"""``/health`` and ``/metrics``: what probes and dashboards ask."""

from __future__ import annotations

import time
from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from qwen_runtime.server.lifecycle import Lifecycle
from qwen_runtime.server.metrics import Metrics

__all__ = ["health_routes"]


def health_routes(lifecycle: Lifecycle, metrics: Metrics, model_name: str) -> list[Route]:
    """The routes ``/health``, ``/health/live``, ``/health/ready`` and ``/metrics``.

    ``live`` is 200 while the process answers and its engine thread runs: restart it where not.
    ``ready`` and ``/health`` are 503 while no request would be taken: send them elsewhere.

    Args:
        lifecycle: What the server is up to.
        metrics: What it has counted.
        model_name: The model's name in the API.
    """

    async def summary(_: Request) -> Response:
        llm = lifecycle.current
        problem = _problem(lifecycle)
        document = {
            "status": "failed" if _engine_problem(lifecycle) else lifecycle.phase,
            "problem": problem,
            "model": model_name,
            "uptime_seconds": round(time.monotonic() - lifecycle.started_at, 3),
            "requests_active": lifecycle.num_active,
            "engine": None if llm is None else asdict(llm.stats()),
        }
        return JSONResponse(document, status_code=503 if problem else 200)

    async def live(_: Request) -> Response:
        dead = lifecycle.phase == "failed" or _engine_problem(lifecycle) is not None
        return _probe(_problem(lifecycle) if dead else None)

    async def ready(_: Request) -> Response:
        return _probe(_problem(lifecycle))

    async def scrape(request: Request) -> Response:
        content, content_type = metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": content_type})

    endpoints = {
        "/health": summary,
        "/health/live": live,
        "/health/ready": ready,
        "/metrics": scrape,
    }
    return [Route(path, endpoint, methods=["GET"]) for path, endpoint in endpoints.items()]


def _probe(problem: str | None) -> Response:
    return PlainTextResponse(f"{problem or 'ok'}\n", status_code=503 if problem else 200)


def _problem(lifecycle: Lifecycle) -> str | None:
    return lifecycle.refusal() or _engine_problem(lifecycle)


def _engine_problem(lifecycle: Lifecycle) -> str | None:
    llm = lifecycle.current
    if llm is None or llm.alive:
        return None
    return "the engine's thread has ended; restart the server"
