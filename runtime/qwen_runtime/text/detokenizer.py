"""Token ids to text piece by piece, without ever showing half of a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from qwen_runtime.text.tokenizer import Tokenizer

__all__ = ["IncrementalDetokenizer"]

_LONGEST_PENDING_BYTES = 3
"""A UTF-8 character is at most four bytes, so at most three wait for the next token."""


class IncrementalDetokenizer:
    """Decodes a growing list of token ids.

    The joined pieces of every ``push`` and the last ``flush`` equal
    ``tokenizer.decode(all_ids, skip_special_tokens)``. That holds because a ByteLevel decoder
    joins the bytes of the tokens and replaces what is no UTF-8, and Python's incremental
    decoder replaces the same maximal subparts (Unicode 15, section 3.9) while it keeps a
    possible beginning of a character for the next call. A token costs its own bytes, however
    long the text has become.

    Args:
        tokenizer: Where the bytes of the tokens come from.
        skip_special_tokens: Leave special tokens out of the text.
        context_ids: Ids before the first pushed one, such as the prompt. If they end inside a
            character, the first piece completes it; their own text is not returned.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        context_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden_ids = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(self._last_bytes(context_ids))

    def _last_bytes(self, ids: Sequence[int]) -> bytes:
        """Return enough of the end of a text to know the character it may be inside of."""
        tail = b""
        for token_id in reversed(ids):
            tail = self.visible_bytes(int(token_id)) + tail
            if len(tail) >= _LONGEST_PENDING_BYTES:
                break
        return tail

    def visible_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text: its bytes, or none if it is left out."""
        return b"" if token_id in self._hidden_ids else self._tokenizer.token_bytes(token_id)

    def push(self, ids: Iterable[int]) -> str:
        """Append token ids and return the text that is now certain, which may be empty."""
        return self.push_bytes(b"".join([self.visible_bytes(int(token_id)) for token_id in ids]))

    def push_bytes(self, raw: bytes) -> str:
        """Append bytes of the text, such as a part of a token, and return what is now certain."""
        return self._decoder.decode(raw)

    def flush(self) -> str:
        """End the text: return U+FFFD for an unfinished character, and start afresh."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
