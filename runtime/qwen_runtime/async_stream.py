"""A request that is read from an event loop while the engine's thread runs it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

from qwen_runtime.engine import Request
from qwen_runtime.generation.rows import Generation, TokenLogprob
from qwen_runtime.outputs import RequestOutput
from qwen_runtime.results import request_outputs
from qwen_runtime.streaming import ChunkReader, StreamChunk

__all__ = ["AsyncTextStream", "Progress", "Signal"]


class Signal:
    """Wakes the tasks that wait for something, from any thread and in any event loop."""

    def __init__(self) -> None:
        # Re-entrant: the collector may end a forgotten stream while it is held.
        self._lock = threading.RLock()
        self._waiters: list[asyncio.Future[None]] = []

    def notify(self) -> None:
        """Have all who wait look again."""
        with self._lock:
            waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            try:
                waiter.get_loop().call_soon_threadsafe(_wake, waiter)
            except RuntimeError:  # its loop was closed meanwhile
                continue

    async def wait(self, ready: Callable[[], bool]) -> None:
        """Return once ``ready()`` is true; it is called again after every `notify`."""
        while not ready():
            waiter = asyncio.get_running_loop().create_future()
            with self._lock:
                self._waiters.append(waiter)
            try:
                # What became true before the waiter was in the list notified nobody.
                if not ready():
                    await waiter
            finally:
                with self._lock:
                    if waiter in self._waiters:
                        self._waiters.remove(waiter)


class Progress:
    """What the engine's thread tells a stream; holds none, so that a forgotten one is freed."""

    def __init__(self, generation: Generation) -> None:
        self.num_tokens = 0
        """Tokens that are complete, log-probabilities included."""
        self.changed = Signal()
        self._row = generation.rows[0]

    def step(self) -> None:
        """A step has brought tokens."""
        self.num_tokens = len(self._row.token_ids)
        self.changed.notify()


class AsyncTextStream:
    """An asynchronous iterator over text pieces of one request.

    The request runs whether it is read or not, and a reader that is slow gets what several steps
    brought as one chunk: what waits for it is at most the request's own tokens. Cancelling a task
    that waits for a piece, `aclose`, leaving the ``async with`` block, or dropping the last
    reference cancels the request; so does `cancel`, from any thread.

    Use `AsyncLLM.stream` to make one.
    """

    def __init__(
        self, generation: Generation, reader: ChunkReader, request: Request, progress: Progress
    ) -> None:
        self._generation = generation
        self._reader = reader
        self._request = request
        self._progress = progress
        self._num_read = 0
        self._has_ended = False

    @property
    def token_ids(self) -> list[int]:
        """Ids generated so far, whether they were read or not."""
        return self._generation.rows[0].token_ids[: self._num_tokens]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the ids so far, if asked for."""
        return self._generation.rows[0].logprobs[: self._num_tokens]

    @property
    def done(self) -> bool:
        """Whether nothing more is generated."""
        return self._request.done.is_set()

    @property
    def output(self) -> RequestOutput:
        """The whole output so far; complete once the stream has ended."""
        return request_outputs(self._generation, self._reader.tokenizer)[0]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while (chunk := await self._next()) is not None:
            if chunk.text:
                return chunk.text
        raise StopAsyncIteration

    async def chunks(self) -> AsyncIterator[StreamChunk]:
        """What is still to come; a chunk brings one step or several."""
        while (chunk := await self._next()) is not None:
            yield chunk

    def cancel(self) -> None:
        """End the stream within one step; may be called from any thread."""
        self._request.cancel()

    async def aclose(self) -> None:
        """Cancel what has not been generated, and wait until the request has left the engine."""
        self._request.cancel()
        self._has_ended = True
        await self._progress.changed.wait(self._request.done.is_set)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._request.cancel()

    @property
    def _num_tokens(self) -> int | None:
        return None if self._request.done.is_set() else self._progress.num_tokens

    def _is_ended(self) -> bool:
        return self._has_ended

    async def _next(self) -> StreamChunk | None:
        """The next chunk; None at the end.

        Raises:
            BackendError: If the engine failed.
            Exception: What a caller's processor or criterion raised.
        """
        if self._is_ended():
            return None
        try:
            await self._progress.changed.wait(
                lambda: self._request.done.is_set() or self._progress.num_tokens > self._num_read
            )
        except asyncio.CancelledError:
            self._request.cancel()
            raise
        if self._is_ended():  # another task closed it, or has read its end
            return None
        ending = self._request.done.is_set()
        chunk = self._reader.read(self._num_tokens, ending=ending)
        self._num_read += len(chunk.token_ids)
        if not ending:
            return chunk
        self._has_ended = True
        if self._request.error is not None:
            raise self._request.error
        return chunk if chunk.text or chunk.token_ids else None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
