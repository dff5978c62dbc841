"""A bundle as a Ray Serve application: replicas of the HTTP server behind Serve's proxies.

    serve run qwen_runtime.deploy.ray_serve:app_builder bundle=DIR num_replicas=2

or, from Python, ``serve.run(build_app(DIR, num_replicas=2))``.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of `app_builder`'s
# argument as it stands.

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

try:
    with warnings.catch_warnings():
        # Ray's modules use what pydantic is about to drop; nobody here can mend that.
        warnings.simplefilter("ignore", DeprecationWarning)
        from ray import serve
        from ray.serve.config import (
            AutoscalingContext,
            BackpressureConfig,
        )
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"Ray Serve must be installed to run qwen_runtime.deploy.ray_serve ({error}): "
        "pip install 'qwen-export[ray]'",
        name=error.name,
    ) from error

from qwen_runtime.backends.registry import DEVICES, check_backend
from qwen_runtime.bundle import Bundle
from qwen_runtime.deploy.ray_arguments import LLM_ARGUMENTS, AppArguments
from qwen_runtime.engine.limits import EngineLimits
from qwen_runtime.errors import BackendError, RequestError
from qwen_runtime.server import ServerSettings, create_app
from qwen_runtime.server.lifecycle import Lifecycle
from qwen_runtime.server.logs import configure_logging

__all__ = [
    "DEPLOYMENT_NAME",
    "Autoscaling",
    "QwenServer",
    "app_builder",
    "build_app",
    "queue_depth_policy",
]

DEPLOYMENT_NAME: Final = "QwenServer"
"""Name of the deployment inside of the application, for the ``deployments`` of a config file."""

_ENGINE_REQUESTS = "engine_requests"
_MAY_BE_NONE = ("max_cache_tokens", "prefill_chunk_size")
_OF_THE_LIMITS = ("max_num_seqs", "max_queued_requests", *_MAY_BE_NONE)
# These are the proxies': Serve's own config file sets them.
_OF_THE_PROXY = ("host", "port", "keep_alive_seconds")
# Between the end of the drain and the kill: the replica must close its model.
_CLOSING_SECONDS = 5.0
# Serve gives a replica up after three checks that failed. It would wait 30 s for each, and the
# requests of a replica that hangs with it.
_HEALTH_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Autoscaling:
    """How many replicas run, by the number of requests that are running or wait.

    Raises:
        RequestError: If a value is wrong; ``param`` names it.
    """

    max_replicas: int
    """Replicas at most, >= min_replicas."""
    min_replicas: int = 1
    """Replicas at least, >= 1."""
    target_ongoing_requests: float | None = None
    """Requests, running and waiting, that each replica should have, > 0; None takes the model's
    ``max_num_seqs``: a further replica starts when requests begin to wait for a row."""
    upscale_delay_s: float = 30.0
    """Seconds of more load than that before replicas are added."""
    downscale_delay_s: float = 600.0
    """Seconds of less load before replicas are taken away."""

    def __post_init__(self) -> None:
        _require_count("min_replicas", self.min_replicas, 1)
        _require_count("max_replicas", self.max_replicas, self.min_replicas)
        if self.target_ongoing_requests is not None:
            _require_seconds("target_ongoing_requests", self.target_ongoing_requests)
            if not self.target_ongoing_requests:
                raise RequestError(
                    "target_ongoing_requests must be > 0 or None, got 0",
                    param="target_ongoing_requests",
                )
        _require_seconds("upscale_delay_s", self.upscale_delay_s)
        _require_seconds("downscale_delay_s", self.downscale_delay_s)


class QwenServer:
    """One replica: the app of `create_app` over a model of its own.

    Serve makes it and asks it; `build_app` is what users call.

    Args:
        bundle: The bundle's folder on the replica's machine.
        settings: Of the server.
        llm_arguments: Of `LLM`.
    """

    def __init__(
        self, bundle: str, settings: ServerSettings, llm_arguments: dict[str, Any]
    ) -> None:
        self._bundle = bundle
        self._settings = settings
        self._llm_arguments = llm_arguments
        self._lifecycle: Lifecycle | None = None

    async def __serve_build_asgi_app__(self) -> Starlette:
        """Make the app and load the model: a replica takes requests once this returns.

        Raises:
            QwenRuntimeError: What opening the bundle raised; Serve reports it and tries again.
        """
        configure_logging(self._settings.log_format)
        app = create_app(self._bundle, self._settings, **self._llm_arguments)
        app.add_middleware(_OneRequestId)
        self._lifecycle = app.state.lifecycle
        await self._lifecycle.loaded()
        return app

    async def check_health(self) -> None:
        """Tell Serve, which asks every few seconds, whether to replace this replica.

        Raises:
            BackendError: If it can answer no request.
        """
        lifecycle = self._lifecycle
        reason = "the model is not loaded" if lifecycle is None else lifecycle.refusal()
        llm = None if lifecycle is None else lifecycle.current
        if reason is None and llm is not None and not llm.alive:
            reason = "the engine's thread has ended"
        if reason is not None:
            raise BackendError(f"a replica must be able to answer, but {reason}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `queue_depth_policy` reads of this replica."""
        llm = None if self._lifecycle is None else self._lifecycle.current
        if llm is None:
            return {_ENGINE_REQUESTS: 0.0}
        stats = llm.stats()
        return {_ENGINE_REQUESTS: float(stats.num_running + stats.num_waiting)}


def queue_depth_policy(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """How many replicas the load asks for; Serve applies limits and delays.

    Serve counts HTTP requests. One of them with ``n`` = 8 is eight for the engine, so what the
    engines count decides where it is more.

    Returns:
        Replicas, a fraction where it is none in whole, and the policy's state: there is none.
    """
    of_engines = (context.aggregated_metrics or {}).get(_ENGINE_REQUESTS, {})
    in_engines = sum(of_engines.values()) + (context.total_queued_requests or 0.0)
    load = max(float(context.total_num_requests), in_engines)
    assert context.config is not None
    return load / context.config.get_target_ongoing_requests(), {}


def build_app(
    bundle: str | Path,
    settings: ServerSettings | None = None,
    *,
    num_replicas: int | Autoscaling = 1,
    **llm_arguments: Any,
) -> serve.Application:
    """Make a Serve application that answers as ``qwen-run serve`` does.

    Every replica loads the bundle from the same path on its own machine and takes as many
    requests as its engine runs and queues. Another ``serve.run`` under the same name, or another
    ``bundle`` in the config file, replaces the replicas one by one; each old one goes on until a
    new one is ready, which needs room for one more, and then has ``drain_seconds`` to finish.

    Args:
        bundle: The bundle's folder; it must be sound on this machine too.
        settings: Of the server. Address and keep-alive are the proxies' and must be left alone.
        num_replicas: Replicas to run, or how to find their number.
        **llm_arguments: Arguments of `LLM`. ``threads`` is also the number of CPUs that Ray keeps
            for a replica; the default is 1. A replica on a GPU takes a whole one.

    Returns:
        What ``serve.run`` takes.

    Raises:
        RequestError: If an argument is wrong or unknown; it names it.
        BundleError: If the folder is no sound bundle.
    """
    settings = settings or ServerSettings()
    _check_settings(settings)
    limits = _check_llm_arguments(llm_arguments)
    opened = Bundle.open(Path(bundle).resolve())
    # Refuses here what every replica would refuse: a bundle without a tokenizer.
    create_app(opened, settings)
    backend = llm_arguments.get("backend", "onnxruntime")
    on_cpu = (llm_arguments.get("device") or DEVICES[backend][0]) == "cpu"
    threads = llm_arguments.get("threads") or 1
    if on_cpu:
        llm_arguments["threads"] = threads
    if isinstance(num_replicas, Autoscaling):
        scale: dict[str, Any] = {"autoscaling_config": _autoscaling(num_replicas, limits)}
    else:
        _require_count("num_replicas", num_replicas, 1)
        scale = {"num_replicas": num_replicas}
    deployment = serve.deployment(
        name=DEPLOYMENT_NAME,
        ray_actor_options={"num_cpus": threads, "num_gpus": 0 if on_cpu else 1},
        max_ongoing_requests=limits.max_num_seqs + limits.max_queued_requests,
        # What waits in a proxy because every replica is full, or none is there yet.
        max_queued_requests=max(1, limits.max_queued_requests),
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        health_check_period_s=_HEALTH_SECONDS,
        health_check_timeout_s=2 * _HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_seconds + _CLOSING_SECONDS,
        # Rounded up: new replicas come before old ones go, one at a time.
        max_surge_percent=1,
        **scale,
    )
    return deployment(serve.ingress()(QwenServer)).bind(str(opened.path), settings, llm_arguments)


def app_builder(arguments: AppArguments) -> serve.Application:
    """Make the application from texts, for ``serve run`` and Serve's config files.

    Args:
        arguments: Those of `build_app` and its settings; ``max_replicas`` turns autoscaling on,
            with ``num_replicas`` as its least.

    Raises:
        RequestError: If an argument is wrong; it names it.
        BundleError: If the folder is no sound bundle.
    """
    scale: int | Autoscaling = arguments.num_replicas
    if arguments.max_replicas is not None:
        scale = Autoscaling(
            max_replicas=arguments.max_replicas,
            min_replicas=arguments.num_replicas,
            target_ongoing_requests=arguments.target_ongoing_requests,
        )
    elif arguments.target_ongoing_requests is not None:
        raise RequestError(
            "target_ongoing_requests must come with max_replicas, which turns autoscaling on",
            param="target_ongoing_requests",
        )
    return build_app(
        arguments.bundle,
        arguments.settings(),
        num_replicas=scale,
        **arguments.llm_arguments(),
    )


class _OneRequestId:
    """Leaves the request id's header to the proxy, where it names the same id: it would come twice.

    Serve gives every request an id before this app sees it; the app keeps the ids it is given.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = (b"x-request-id", Headers(scope=scope).get("x-request-id", "").encode("latin-1"))

        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [tuple(header) for header in message["headers"] if tuple(header) != given]
                message = {**message, "headers": kept}
            await send(message)

        return await self.app(scope, receive, once)


def _autoscaling(scaling: Autoscaling, limits: EngineLimits) -> dict[str, Any]:
    return {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "target_ongoing_requests": scaling.target_ongoing_requests or limits.max_num_seqs,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
        "policy": {"policy_function": f"{__name__}:{queue_depth_policy.__name__}"},
    }


def _check_settings(settings: ServerSettings) -> None:
    defaults = ServerSettings()
    for name in _OF_THE_PROXY:
        if getattr(settings, name) != getattr(defaults, name):
            raise RequestError(
                f"{name} is the proxies' and must be left alone here, got "
                f"{getattr(settings, name)!r}; set it in http_options of Serve's config",
                param=name,
            )


def _check_llm_arguments(arguments: dict[str, Any]) -> EngineLimits:
    for name in arguments:
        if name not in LLM_ARGUMENTS:
            raise RequestError(
                f"{name} is no argument of a replica; they are {', '.join(sorted(LLM_ARGUMENTS))}",
                param=name,
            )
    threads = arguments.get("threads")
    check_backend(arguments.get("backend", "onnxruntime"), arguments.get("device"), threads)
    if threads is not None:
        _require_count("threads", threads, 1)
    if "prefix_cache_slots" in arguments:
        _require_count("prefix_cache_slots", arguments["prefix_cache_slots"], 0)
    return EngineLimits(
        **{
            name: value
            for name, value in arguments.items()
            if name in _OF_THE_LIMITS and not (name in _MAY_BE_NONE and value is None)
        }
    )


def _require_count(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RequestError(f"{name} must be an integer >= {least}, got {value!r}", param=name)


def _require_seconds(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (math.isfinite(float(str(value))) and float(str(value)) >= 0):
        raise RequestError(f"{name} must be a finite number >= 0, got {value!r}", param=name)
