"""Log-probabilities of tokens in the two shapes of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Set
from typing import Any, Final

from qwen_runtime.outputs import TokenLogprob
from qwen_runtime.text import Tokenizer

__all__ = ["LegacyLogprobs", "chat_logprobs"]

_LEAST: Final = -9999.0
"""In place of minus infinity, which JSON cannot write."""


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob], leave_out: Set[int]
) -> list[dict[str, Any]]:
    """The entries of ``logprobs.content``.

    Args:
        tokenizer: The model's.
        logprobs: One per generated token.
        leave_out: End tokens, which are no part of the text.
    """
    return [
        _entry(tokenizer, item.token_id, item.logprob)
        | {"top_logprobs": [_entry(tokenizer, *candidate) for candidate in item.top]}
        for item in logprobs
        if item.token_id not in leave_out
    ]


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": raw.decode("utf-8", "replace"),
        "logprob": max(logprob, _LEAST),
        "bytes": list(raw),
    }


class LegacyLogprobs:
    """The object ``logprobs`` of a completion, which grows with it.

    Args:
        tokenizer: The model's.
        leave_out: End tokens, which are no part of the text.
        offset: Characters of the choice's text before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, leave_out: Set[int], offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._leave_out = leave_out
        self._offset = offset
        # A token may begin inside a character: its offset is that of the character.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
        """The object for the next tokens."""
        taken: dict[str, Any] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for item in logprobs:
            if item.token_id in self._leave_out:
                continue
            taken["text_offset"].append(self._offset)
            taken["token_logprobs"].append(max(item.logprob, _LEAST))
            taken["tokens"].append(self._text(item.token_id))
            taken["top_logprobs"].append(self._candidates(item))
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(item.token_id)))
        return taken

    def _candidates(self, item: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the token itself. Of equal texts the likelier counts."""
        found: dict[str, float] = {}
        for token_id, logprob in (*item.top, (item.token_id, item.logprob)):
            found.setdefault(self._text(token_id), max(logprob, _LEAST))
        return found

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
