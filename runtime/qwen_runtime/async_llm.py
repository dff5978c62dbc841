"""`AsyncLLM`: a bundle that generates for tasks of an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qwen_runtime.async_stream import AsyncTextStream, Progress, Signal
from qwen_runtime.bundle import Bundle
from qwen_runtime.calls import PreparedCall, prepare_generation, prepare_stream
from qwen_runtime.engine import EngineStats, Request
from qwen_runtime.errors import (
    CapacityError,
    EngineClosedError,
    QueueFullError,
    RequestError,
)
from qwen_runtime.generation_config import GenerationConfig
from qwen_runtime.llm import LLM, Prompt
from qwen_runtime.streaming import ChunkReader

__all__ = ["AsyncLLM", "AsyncTextStream"]


class AsyncLLM:
    """Generates with an `LLM`'s engine, which a thread of its own steps.

    Safe to use from many tasks, threads and event loops, beside the `LLM` itself. Requests join
    and leave between steps; what else runs changes no output of an fp32 bundle on the CPU, and
    with other weights the last bits of logits at most. Callers' processors, criteria and streamers
    are called in the thread that steps, mostly the engine's own: what they do delays all requests.

    Args:
        llm: An open LLM, which stays its owner's; or a bundle, or its folder, which is opened here
            and closed with this object.
        **llm_arguments: Of `LLM`, for a bundle that is opened here.

    Raises:
        RequestError: If there are arguments for an LLM that is open already.
        BundleError: If the folder is no sound bundle.
        BackendError: If the engine is missing or cannot load it.
    """

    def __init__(self, llm: LLM | str | Path | Bundle, **llm_arguments: Any) -> None:
        self._owned = not isinstance(llm, LLM)
        if isinstance(llm, LLM):
            if llm_arguments:
                names = ", ".join(llm_arguments)
                raise RequestError(
                    f"arguments of an LLM go to the LLM that is opened, got {names} beside an open "
                    "one; open it with them",
                    param=next(iter(llm_arguments)),
                )
            self.llm = llm
        else:
            self.llm = LLM(llm, **llm_arguments)
        self._lock = threading.RLock()
        self._requests: set[Request] = set()
        self._changed = Signal()
        self._accepting = True

    async def generate(
        self,
        prompt: Any = None,
        generation_config: GenerationConfig | None = None,
        **arguments: Any,
    ) -> Any:
        """Generate; arguments, result and errors are those of `LLM.generate`.

        Cancelling the task that waits cancels its requests.

        Raises:
            QueueFullError: If as many requests wait as may.
            EngineClosedError: If this object takes no more requests.
        """
        prepared = prepare_generation(self.llm, prompt, generation_config, **arguments)
        changed = Signal()

        def done(request: Request) -> None:
            self._forget(request)
            changed.notify()

        requests = prepared.requests(on_done=done, background=True)
        self._submit(prepared, requests)
        try:
            await changed.wait(lambda: _ended(requests))
        finally:
            # The others', where one failed; all, where this task was cancelled.
            for request in requests:
                request.cancel()
        for request in requests:
            if request.error is not None:
                raise request.error
        return prepared.collect()

    def stream(
        self,
        prompt: Prompt,
        generation_config: GenerationConfig | None = None,
        **arguments: Any,
    ) -> AsyncTextStream:
        """Generate for one prompt, piece by piece; arguments are those of `LLM.stream`.

        Everything is checked before this returns, and the model runs from then on.

        Raises:
            RequestError: If an argument is wrong or unknown; it names it.
            CapacityError: If prompt and new tokens do not fit.
            QueueFullError: If as many requests wait as may.
            EngineClosedError: If this object takes no more requests.
            BackendError: If the LLM is closed.
        """
        prepared = prepare_stream(self.llm, prompt, generation_config, **arguments)
        generation = prepared.machines[0].generation
        reader = ChunkReader(generation, self.llm.tokenizer)
        progress = Progress(generation)

        def done(request: Request) -> None:
            self._forget(request)
            progress.changed.notify()

        requests = prepared.requests(on_step=progress.step, on_done=done, background=True)
        self._submit(prepared, requests)
        return AsyncTextStream(generation, reader, requests[0], progress)

    @property
    def alive(self) -> bool:
        """Whether requests are served: the LLM is open, and the engine's thread has not died."""
        return self.llm.alive

    def stats(self) -> EngineStats:
        """What the engine has done and is at; cheap, from any thread."""
        return self.llm.stats()

    async def drain(self, timeout: float | None) -> bool:
        """Take no more requests, and wait until those that were accepted have ended.

        Args:
            timeout: Seconds to wait at most; None waits as long as it takes.

        Returns:
            Whether all have ended.

        Raises:
            RequestError: If the timeout is no number of seconds; requests are taken as before.
        """
        _require_seconds(timeout)
        self._refuse_more()
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait(lambda: not self._requests)
        except TimeoutError:
            return False
        return True

    async def aclose(self) -> None:
        """Cancel what runs and take no more; closes the LLM if it was opened here."""
        for request in self._refuse_more():
            request.cancel()
        await self._changed.wait(lambda: not self._requests)
        if self._owned:
            await asyncio.to_thread(self.llm.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _refuse_more(self) -> list[Request]:
        """Take no more requests; returns those that were accepted and have not ended."""
        with self._lock:  # not between the check of one that comes and its entry
            self._accepting = False
            return list(self._requests)

    def _submit(self, prepared: PreparedCall, requests: Sequence[Request]) -> None:
        with self._lock:
            if not self._accepting:
                raise EngineClosedError(
                    "a request must come before the service is drained or closed; send it to "
                    "another one"
                )
            self._requests.update(requests)
        try:
            self.llm._engine.submit(requests)
        except BaseException as error:
            for request in requests:
                self._forget(request)
            if isinstance(error, CapacityError) and not isinstance(error, QueueFullError):
                prepared.name_setting(error)
            raise

    def _forget(self, request: Request) -> None:
        with self._lock:
            self._requests.discard(request)
        self._changed.notify()


def _ended(requests: Sequence[Request]) -> bool:
    """Whether there is nothing to wait for: all are done, or one has failed."""
    failed = any(request.error is not None and request.done.is_set() for request in requests)
    return failed or all(request.done.is_set() for request in requests)


def _require_seconds(timeout: object) -> None:
    if timeout is None:
        return
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout >= 0:
        raise RequestError(
            f"timeout must be seconds >= 0, or None to wait for ever, got {timeout!r}",
            param="timeout",
        )
