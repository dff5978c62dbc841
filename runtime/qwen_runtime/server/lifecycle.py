"""What a server is up to, from loading its model until its last request has ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from qwen_runtime.errors import QwenRuntimeError

if TYPE_CHECKING:
    from qwen_runtime.async_llm import AsyncLLM

__all__ = ["Lifecycle", "NotReadyError", "Phase"]

_LOG = logging.getLogger("qwen_runtime.server")

Phase = Literal["loading", "ready", "draining", "stopped", "failed"]

_REASONS: dict[str, str] = {
    "loading": "the model is being loaded; try again in a moment",
    "draining": "the server is stopping and takes no new requests; send it to another one",
    "stopped": "the server has stopped; send the request to another one",
    "failed": "the model could not be loaded; see the server's log",
}


class NotReadyError(QwenRuntimeError):
    """The server cannot take a request now; another one, or a later try, can."""


class Lifecycle:
    """The model behind an app, and whether requests may reach it.

    It belongs to one event loop. A model that is given is ready at once and stays its owner's;
    one that is opened here is closed here.

    Args:
        source: The model, or what opens it. Opening runs in a thread of its own: it takes long,
            and health must be answered meanwhile.
    """

    def __init__(self, source: AsyncLLM | Callable[[], AsyncLLM]) -> None:
        self._open = source if callable(source) else None
        self._llm: AsyncLLM | None = None if callable(source) else source
        self._phase: Phase = "loading" if self._llm is None else "ready"
        self._loading: asyncio.Task[AsyncLLM] | None = None
        self._awaited = False
        self._active: set[asyncio.Task[object]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._expired = False
        self._drain_seconds = 0.0
        self.started_at = time.monotonic()
        """Seconds on the monotonic clock when the app was made."""

    @property
    def phase(self) -> Phase:
        """Where the server stands now."""
        return self._phase

    @property
    def num_active(self) -> int:
        """Requests to the model that were taken and have not ended."""
        return len(self._active)

    @property
    def expired(self) -> bool:
        """Whether the time to drain is over and what was left has been cancelled."""
        return self._expired

    @property
    def current(self) -> AsyncLLM | None:
        """The model, once it is loaded."""
        return self._llm

    @property
    def llm(self) -> AsyncLLM:
        """The model.

        Raises:
            NotReadyError: If it is not loaded.
        """
        if self._llm is None:
            raise NotReadyError(self.refusal() or _REASONS["loading"])
        return self._llm

    def refusal(self) -> str | None:
        """Why no request is taken now; None where they are."""
        return _REASONS.get(self._phase)

    async def begin(self) -> None:
        """Take requests as an app's lifespan begins, a second one too, and `start`."""
        if self._phase == "stopped":
            self._loading, self._awaited, self._expired = None, False, False
            self._phase = "loading" if self._llm is None else "ready"
        await self.start()

    async def start(self) -> None:
        """Begin to load the model, and return at once; does nothing for one that was given."""
        if self._open is not None and self._loading is None:
            self._loading = asyncio.create_task(self._load(self._open))
            self._loading.add_done_callback(self._tell)

    async def loaded(self) -> AsyncLLM:
        """Wait for the model.

        Raises:
            Exception: What opening it raised.
        """
        self._awaited = True
        await self.start()
        if self._loading is not None:
            return await asyncio.shield(self._loading)
        return self.llm

    async def stop(self) -> None:
        """Take no more requests, and close a model that was opened here."""
        self._phase = "stopped"
        if self._loading is None:
            return
        # A thread cannot be cancelled: what it opens late must still be closed.
        await asyncio.wait({self._loading})
        if not self._loading.cancelled() and self._loading.exception() is None:
            llm, self._llm = self._loading.result(), None
            await llm.aclose()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count the running task as a request: a drain waits for it, then cancels it."""
        task = asyncio.current_task()
        assert task is not None
        self._active.add(task)
        self._idle.clear()
        try:
            yield
        finally:
            self._active.discard(task)
            if not self._active:
                self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Take no new requests, and give those that run time to end; cancel the rest.

        Args:
            seconds: How long they may take.

        Returns:
            Whether all ended by themselves.
        """
        self._phase = "draining"
        self._drain_seconds = seconds
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self._expired = True
            for task in self._active:
                task.cancel()
            return False
        return True

    def expiry(self) -> str:
        """What a request is told that outlived the time to drain."""
        return (
            f"the server stopped before the answer was complete: its {self._drain_seconds:g} s "
            "for running requests are over; send the request again, to another server"
        )

    def _tell(self, loading: asyncio.Task[AsyncLLM]) -> None:
        """Log why loading failed, where nobody waits to be told."""
        error = None if loading.cancelled() else loading.exception()
        if error is not None and not self._awaited:
            _LOG.error("the model could not be loaded", exc_info=error)

    async def _load(self, open_llm: Callable[[], AsyncLLM]) -> AsyncLLM:
        try:
            llm = await asyncio.to_thread(open_llm)
        except BaseException:
            self._phase = "failed"
            raise
        self._llm = llm
        if self._phase == "loading":
            self._phase = "ready"
        return llm
