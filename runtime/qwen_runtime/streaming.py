"""A request that is read while it runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from qwen_runtime.errors import RequestError
from qwen_runtime.generation.rows import Generation, TokenLogprob
from qwen_runtime.outputs import RequestOutput
from qwen_runtime.results import request_outputs
from qwen_runtime.text import (
    IncrementalDetokenizer,
    StoppingDetokenizer,
    StopStringMatcher,
    Tokenizer,
)

__all__ = ["ChunkReader", "StreamChunk", "TextStream"]


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What one step of a stream brought."""

    text: str
    """Text that is now certain; empty while a character or a stop string is incomplete."""
    token_ids: list[int]
    """Generated ids; empty in a last chunk that only completes the text."""
    logprobs: list[TokenLogprob]
    """One per id, if asked for."""


class TextStream:
    """An iterator over text pieces of one request.

    A piece holds whole characters and may cover several tokens; pieces are never empty. `chunks`
    gives the same text together with token ids and log-probabilities, step by step. Closing the
    stream, or leaving its ``with`` block, cancels what has not been generated; `cancel` does
    so from another thread.
    """

    def __init__(
        self,
        decoding: Generation,
        tokenizer: Tokenizer | None,
        run: Callable[[], Iterator[None]],
        cancel: Callable[[], None],
        settle: Callable[[], None],
    ) -> None:
        reader = ChunkReader(decoding, tokenizer)
        self._decoding = decoding
        self._cancel = cancel
        self._settle = settle
        self._tokenizer = reader.tokenizer
        self._chunks = _read(reader, run())

    @property
    def token_ids(self) -> list[int]:
        """Ids generated so far."""
        return list(self._decoding.rows[0].token_ids)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the ids so far, if asked for."""
        return list(self._decoding.rows[0].logprobs)

    @property
    def output(self) -> RequestOutput:
        """The whole output so far; complete once the stream has ended."""
        return request_outputs(self._decoding, self._tokenizer)[0]

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not (text := next(self._chunks).text):
            pass
        return text

    def chunks(self) -> Iterator[StreamChunk]:
        """What is still to come, one chunk for every step."""
        return self._chunks

    def cancel(self) -> None:
        """End the stream within one step; may be called from any thread."""
        self._cancel()

    def close(self) -> None:
        """Cancel what has not been generated; for the thread that reads the stream."""
        self._chunks.close()
        self._settle()
        if not self._decoding.finished:
            self._decoding.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ChunkReader:
    """What a request's steps have brought since it was last asked.

    Args:
        generation: The request.
        tokenizer: Its text's; None is refused.

    Raises:
        RequestError: If there is no tokenizer.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None:
            raise RequestError(
                "a stream gives text, but this bundle has no tokenizer; use generate",
                param="prompt",
            )
        self.tokenizer = tokenizer
        self._row = generation.rows[0]
        self._seen = 0
        self._detokenizer = _detokenizer(generation, tokenizer)

    def read(self, count: int | None = None, *, ending: bool = False) -> StreamChunk:
        """The next chunk.

        Args:
            count: Tokens that are there, where more may be on their way just now; None for all.
            ending: Whether no more will come.
        """
        ids = self._row.token_ids[self._seen : count]
        logprobs = self._row.logprobs[self._seen : count]
        self._seen += len(ids)
        text = self._detokenizer.push(ids)
        return StreamChunk(text + (self._detokenizer.flush() if ending else ""), ids, logprobs)


def _detokenizer(
    generation: Generation, tokenizer: Tokenizer
) -> IncrementalDetokenizer | StoppingDetokenizer:
    stop = generation.config.stop
    if not stop:
        return IncrementalDetokenizer(tokenizer, True)
    matcher = StopStringMatcher(tokenizer, stop)
    return StoppingDetokenizer(
        tokenizer, matcher, context_ids=generation.prompt_tokens(0).tolist()
    )


def _read(reader: ChunkReader, steps: Iterator[None]) -> Generator[StreamChunk]:
    """What every step brings. Holds no stream, so that a forgotten one is freed at once."""
    for _ in steps:
        yield reader.read()
    # Steps of other requests may have carried this one to its end since it was last read.
    last = reader.read(ending=True)
    if last.text or last.token_ids:
        yield last
