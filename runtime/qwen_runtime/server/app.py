"""`create_app`: the server's parts put together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from qwen_runtime.async_llm import AsyncLLM
from qwen_runtime.bundle import Bundle
from qwen_runtime.errors import RequestError
from qwen_runtime.llm import LLM
from qwen_runtime.server.chat import chat_endpoint
from qwen_runtime.server.completions import completion_endpoint
from qwen_runtime.server.errors import exception_handlers
from qwen_runtime.server.health import health_routes
from qwen_runtime.server.lifecycle import Lifecycle
from qwen_runtime.server.metrics import Metrics
from qwen_runtime.server.middleware import middleware_stack
from qwen_runtime.server.models import (
    detokenize_endpoint,
    model_endpoint,
    models_endpoint,
    tokenize_endpoint,
)
from qwen_runtime.server.openapi import openapi_document
from qwen_runtime.server.page import page_route
from qwen_runtime.server.service import Service
from qwen_runtime.server.settings import ServerSettings

__all__ = ["create_app"]


def create_app(
    llm: AsyncLLM | LLM | Bundle | str | Path,
    settings: ServerSettings | None = None,
    **llm_arguments: Any,
) -> Starlette:
    """Make the app: routes, middleware, error answers and lifespan.

    It may be run by itself or mounted in another app, under any prefix. A bundle is loaded when
    the app's lifespan starts; or, in an app that does not pass its lifespan on to what is mounted
    in it, with the first request, and then until the process ends. ``app.state.lifecycle`` is
    the `Lifecycle`, ``app.state.metrics`` the `Metrics`.

    Args:
        llm: A model that is open, which stays its owner's; or a bundle, or its folder, to load.
        settings: Settings of the server.
        **llm_arguments: Arguments of `LLM` for a bundle: device, threads, max_num_seqs, ...

    Raises:
        RequestError: If the bundle has no tokenizer, or there are arguments for an open model.
        BundleError: If the folder is no sound bundle.
    """
    settings = settings or ServerSettings()
    if isinstance(llm, str | Path):
        llm = Bundle.open(llm)
    bundle = _bundle(llm)
    if bundle.manifest.tokenizer is None:
        raise RequestError(
            f"a server answers in text, but {bundle.path} has no tokenizer; build the bundle "
            "from a checkpoint with one",
            param="llm",
        )
    lifecycle = _lifecycle(llm, llm_arguments)
    name = settings.served_model_name or bundle.path.resolve().name
    metrics = Metrics(name, lambda: lifecycle.current.stats() if lifecycle.current else None)
    service = Service(
        lifecycle=lifecycle,
        metrics=metrics,
        model_name=name,
        fingerprint=_fingerprint(bundle),
        created=int(datetime.fromisoformat(bundle.manifest.created).timestamp()),
    )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await lifecycle.begin()
        try:
            yield
        finally:
            await lifecycle.stop()

    app = Starlette(
        routes=_routes(settings, service),
        middleware=[
            Middleware(_LoadOnDemand, lifecycle=lifecycle),
            *middleware_stack(settings, lifecycle, metrics),
        ],
        exception_handlers=exception_handlers,
        lifespan=lifespan,
    )
    # A redirect would name the scheme and host that a proxy in front has hidden.
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.lifecycle = lifecycle
    app.state.metrics = metrics
    return app


def _bundle(llm: AsyncLLM | LLM | Bundle) -> Bundle:
    if isinstance(llm, Bundle):
        return llm
    return llm.llm.bundle if isinstance(llm, AsyncLLM) else llm.bundle


def _lifecycle(llm: AsyncLLM | LLM | Bundle, llm_arguments: dict[str, Any]) -> Lifecycle:
    if isinstance(llm, Bundle):
        return Lifecycle(lambda: AsyncLLM(llm, **llm_arguments))
    if isinstance(llm, LLM):
        return Lifecycle(AsyncLLM(llm, **llm_arguments))
    if llm_arguments:
        raise RequestError(
            f"{next(iter(llm_arguments))} is for a bundle that is loaded here, got an open model; "
            "pass it to the model",
            param=next(iter(llm_arguments)),
        )
    return Lifecycle(llm)


def _fingerprint(bundle: Bundle) -> str:
    """A word for the bundle's content: the hashes of its files, hashed."""
    hashes = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return f"fp_{digest[:12]}"


def _routes(settings: ServerSettings, service: Service) -> list[Route]:
    described = openapi_document(service.model_name, needs_key=bool(settings.api_keys))

    async def openapi_endpoint(request: Request) -> Response:
        servers = [{"url": request.scope.get("root_path") or "/"}]
        return JSONResponse(described | {"servers": servers})

    return [
        Route("/v1/chat/completions", chat_endpoint, methods=["POST"]),
        Route("/v1/completions", completion_endpoint, methods=["POST"]),
        Route("/v1/models", models_endpoint, methods=["GET"]),
        # A model's name may hold slashes, as those of hubs do.
        Route("/v1/models/{model:path}", model_endpoint, methods=["GET"]),
        Route("/tokenize", tokenize_endpoint, methods=["POST"]),
        Route("/detokenize", detokenize_endpoint, methods=["POST"]),
        Route("/openapi.json", openapi_endpoint, methods=["GET"]),
        *health_routes(service.lifecycle, service.metrics, service.model_name),
        *([page_route()] if settings.page else []),
    ]


class _LoadOnDemand:
    """Begins to load the model with the first request, where no lifespan has."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app = app
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] == "http":
            await self._lifecycle.start()
        await self.app(scope, receive, send)
