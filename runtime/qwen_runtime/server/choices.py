"""The answers to one request: started together, read together, cancelled together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_runtime.async_llm import AsyncLLM, AsyncTextStream
from qwen_runtime.errors import CapacityError, RequestError
from qwen_runtime.outputs import RequestOutput
from qwen_runtime.server.lifecycle import NotReadyError
from qwen_runtime.server.metrics import Metrics, RequestMetrics
from qwen_runtime.streaming import StreamChunk

__all__ = ["Call", "Choices", "Piece"]


@dataclass(frozen=True, slots=True)
class Call:
    """What one answer is generated from."""

    prompt: list[int]
    """Token ids."""
    settings: dict[str, Any]
    """Keyword arguments of ``stream``."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step brought for one answer, or its end."""

    index: int
    """Which answer."""
    chunk: StreamChunk | None
    """None at the end."""


class Choices:
    """Answers that are being generated.

    Args:
        llm: The model.
        metrics: Where they are counted.
        calls: What to generate, in the order of their indices.

    Raises:
        RequestError: If a setting is wrong, or more is asked for than could ever run. Nothing is
            running then.
        QueueFullError: If not all of them find a place.
    """

    def __init__(self, llm: AsyncLLM, metrics: Metrics, calls: Sequence[Call]) -> None:
        self._calls = calls
        self._streams: list[AsyncTextStream] = []
        self._clocks: list[RequestMetrics] = []
        stats = llm.stats()
        most = stats.max_running + stats.max_waiting
        if len(calls) > most:
            raise RequestError(
                f"a request must be for at most {most} answers, as many as the server runs and "
                f"queues, got {len(calls)}; send several requests",
                param="n",
            )
        try:
            for call in self._calls:
                clock = metrics.track()
                self._streams.append(llm.stream(call.prompt, **call.settings))
                self._clocks.append(clock)
        except BaseException:
            self._cancel("cancelled")
            raise

    @classmethod
    async def start(cls, llm: AsyncLLM, metrics: Metrics, calls: Sequence[Call]) -> Choices:
        """Begin to generate; arguments and errors are those of the class.

        Grammars are compiled in a thread: the tokens of others shall not wait for it.
        """
        if any("response_format" in call.settings for call in calls):
            return await asyncio.to_thread(cls, llm, metrics, calls)
        return cls(llm, metrics, calls)

    @property
    def outputs(self) -> Sequence[RequestOutput]:
        """Every answer so far, by its index."""
        return [stream.output for stream in self._streams]

    def output(self, index: int) -> RequestOutput:
        """One answer so far; complete after its last piece."""
        return self._streams[index].output

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield what every step brings, and a last piece for every answer.

        Leaving the generator cancels what still runs.

        Raises:
            NotReadyError: If the engine was stopped below it, or memory ran out.
            BackendError: If the engine failed.
        """
        reason = "cancelled"
        try:
            if len(self._streams) == 1:
                async with contextlib.aclosing(self._read(0)) as one:
                    async for piece in one:
                        yield piece
            else:
                async with contextlib.aclosing(self._merged()) as several:
                    async for piece in several:
                        yield piece
        except Exception:
            reason = "error"
            raise
        finally:
            self._cancel(reason)

    async def finish(self) -> Sequence[RequestOutput]:
        """Wait for all answers."""
        async with contextlib.aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass
        return self.outputs

    async def _read(self, index: int) -> AsyncGenerator[Piece, None]:
        stream, clock = self._streams[index], self._clocks[index]
        try:
            async for chunk in stream.chunks():
                clock.tokens(len(chunk.token_ids))
                yield Piece(index, chunk)
        except CapacityError as error:
            # The request kept to every limit; what it lacks now is memory, shared with others.
            raise NotReadyError(str(error)) from error
        output = stream.output
        if output.finish_reason == "cancelled":
            raise NotReadyError("the model was stopped before the answer was complete; try again")
        clock.finish(output.finish_reason, prompt_tokens=len(self._calls[index].prompt))
        yield Piece(index, None)

    async def _merged(self) -> AsyncGenerator[Piece, None]:
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        async def read(index: int) -> None:
            try:
                async for piece in self._read(index):
                    queue.put_nowait(piece)
            except Exception as error:  # noqa: BLE001 - raised again by the reader
                queue.put_nowait(error)

        readers = [asyncio.create_task(read(index)) for index in range(len(self._streams))]
        running = len(readers)
        try:
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                running -= item.chunk is None
                yield item
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.gather(*readers, return_exceptions=True)

    def _cancel(self, reason: str) -> None:
        """End what still runs; does nothing to answers that are complete."""
        for stream in self._streams:
            stream.cancel()
        for call, clock in zip(self._calls, self._clocks, strict=False):
            clock.finish(reason, prompt_tokens=len(call.prompt))
