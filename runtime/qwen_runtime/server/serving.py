"""`serve`: an app behind uvicorn, from the first probe to the end of the last request."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from qwen_runtime.errors import QwenRuntimeError
from qwen_runtime.server.lifecycle import Lifecycle
from qwen_runtime.server.settings import ServerSettings

__all__ = ["AddressError", "serve"]

_LOG = logging.getLogger("qwen_runtime.server")
# After the drain only last bytes are on their way.
_FLUSH_SECONDS = 3


class AddressError(QwenRuntimeError):
    """The server cannot listen where it was told to."""


def serve(
    app: Starlette,
    settings: ServerSettings,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Listen, load the model, and answer until SIGTERM or SIGINT.

    The socket is open before the model is loaded, so that probes get their 503. A first signal
    lets running requests end within ``settings.drain_seconds``, during which new ones get 503;
    a second one ends the process at once, as that signal does by default.

    Args:
        app: What `create_app` made; ``app.state.lifecycle`` is its lifecycle.
        settings: Where to listen and how long to drain.
        on_ready: Called with the server's address once requests are taken.

    Raises:
        AddressError: If the address is taken or is none of this machine's.
        QwenRuntimeError: What loading the model raised.
    """
    with _listen(settings.host, settings.port) as listener:
        asyncio.run(_run(app, settings, listener, on_ready))


async def _run(
    app: Starlette,
    settings: ServerSettings,
    listener: socket.socket,
    on_ready: Callable[[str], None],
) -> None:
    lifecycle: Lifecycle = app.state.lifecycle
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
    )
    server = _Server(config, lifecycle, settings.drain_seconds)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    loading = asyncio.create_task(lifecycle.loaded())
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is not None:
            server.should_exit = True
        elif lifecycle.phase == "ready":
            on_ready(_url(settings.host, listener))
        await serving
        if loading.done():
            loading.result()
    finally:
        loading.cancel()


class _Server(uvicorn.Server):
    """uvicorn's server, which drains its app before it stops to listen."""

    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, drain_seconds: float) -> None:
        super().__init__(config)
        self._lifecycle = lifecycle
        self._drain_seconds = drain_seconds
        self._loop = asyncio.get_running_loop()
        self._stopping: asyncio.Task[None] | None = None
        self._signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; at the second let it do what it does by default."""
        if self._signalled:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._signalled = True
        # A signal may come between any two instructions: only the loop touches its own tasks.
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._stopping = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        _LOG.info(
            "stopping: %d requests may take %g s more",
            self._lifecycle.num_active,
            self._drain_seconds,
        )
        if not await self._lifecycle.drain(self._drain_seconds):
            _LOG.warning("stopping: %d requests were cut", self._lifecycle.num_active)
        self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        # Python adds the address to a system's error, which the sentence names already; the error
        # of a look-up has numbers of its own.
        if error.errno is None or isinstance(error, socket.gaierror):
            reason = error.strerror or str(error)
        else:
            reason = os.strerror(error.errno)
        raise AddressError(
            f"the server must listen on {host} port {port}, but cannot: {reason}; choose another "
            "--host or --port (0 takes a free one)"
        ) from error


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
