"""Streamers with transformers' interface: text printed or queued while it is generated."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from qwen_runtime.errors import RequestError

__all__ = ["TextIteratorStreamer", "TextStreamer"]

_CJK_RANGES = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""Ideographs only: kana and Hangul belong to scripts that wait for a word to end."""


class _Decodes(Protocol):
    """What a streamer needs of a tokenizer; ours and transformers' have it."""

    @property
    def decode(self) -> Any: ...


class TextStreamer:
    """Prints text to stdout as whole words form.

    A piece ends at a line break, an ideograph or the last space, so that what is printed never
    changes with the next token. Subclass it and override ``on_finalized_text`` to send the
    pieces elsewhere.

    Args:
        tokenizer: Decodes the ids.
        skip_prompt: Leave out the first ``put``, which is the prompt.
        **decode_kwargs: Passed to ``tokenizer.decode``, such as ``skip_special_tokens=True``.

    Source:
        ``transformers.TextStreamer`` 5.23: same pieces, call by call.
    """

    def __init__(
        self, tokenizer: _Decodes, skip_prompt: bool = False, **decode_kwargs: Any
    ) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self.token_cache: list[int] = []
        self.print_len = 0
        self.next_tokens_are_prompt = True

    def put(self, value: ArrayLike) -> None:
        """Receive the next token ids: first the prompt, then what each step generated.

        Args:
            value: int64, [S] or [1, S]; S may be more than one (speculative steps).

        Raises:
            RequestError: If more than one row is given.
        """
        ids = np.asarray(value)
        if ids.ndim > 1 and ids.shape[0] > 1:
            raise RequestError(
                f"TextStreamer only supports batch size 1, got {ids.shape[0]} rows; "
                "generate one prompt at a time",
                param="streamer",
            )
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache.extend(ids.reshape(-1).tolist())
        text = self._decode_cache()
        if text.endswith("\n"):
            piece = text[self.print_len :]
            self.token_cache = []
            self.print_len = 0
        else:
            certain = len(text) if text and _is_cjk(text[-1]) else text.rfind(" ") + 1
            piece = text[self.print_len : certain]
            self.print_len += len(piece)
        self.on_finalized_text(piece)

    def end(self) -> None:
        """Send what is left; the next ``put`` is a prompt again."""
        piece = self._decode_cache()[self.print_len :] if self.token_cache else ""
        self.token_cache = []
        self.print_len = 0
        self.next_tokens_are_prompt = True
        self.on_finalized_text(piece, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece, and a line break after the last one.

        Args:
            text: The piece, which may be empty.
            stream_end: True for the last piece of a generation.
        """
        print(text, flush=True, end="\n" if stream_end else "")  # noqa: T201  its purpose

    def _decode_cache(self) -> str:
        text: str = self.tokenizer.decode(self.token_cache, **self.decode_kwargs)
        return text


class TextIteratorStreamer(TextStreamer):
    """Queues the pieces of a generation that runs in another thread; iterate to read them.

    Empty pieces are yielded too, one a step.

    Args:
        tokenizer: Decodes the ids.
        skip_prompt: Leave out the prompt.
        timeout: Seconds to wait for a piece before ``queue.Empty`` is raised; None waits for ever.
        **decode_kwargs: Passed to ``tokenizer.decode``.

    Source:
        ``transformers.TextIteratorStreamer`` 5.23.
    """

    def __init__(
        self,
        tokenizer: _Decodes,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.text_queue: Queue[str | None] = Queue()
        self.stop_signal = None
        self.timeout = timeout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue a piece, and the stop signal after the last one."""
        self.text_queue.put(text, timeout=self.timeout)
        if stream_end:
            self.text_queue.put(self.stop_signal, timeout=self.timeout)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece


def _is_cjk(character: str) -> bool:
    code = ord(character)
    return any(first <= code <= last for first, last in _CJK_RANGES)
