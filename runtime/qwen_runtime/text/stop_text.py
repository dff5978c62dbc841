"""Text that ends before a stop string, all at once or while it streams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress

from qwen_runtime.text.detokenizer import IncrementalDetokenizer
from qwen_runtime.text.stop import StopMatch, StopStringMatcher
from qwen_runtime.text.tokenizer import Tokenizer

__all__ = ["StoppingDetokenizer", "trim_stop_string"]


def trim_stop_string(
    tokenizer: Tokenizer,
    generated_ids: Sequence[int],
    match: StopMatch,
    skip_special_tokens: bool = True,
) -> str:
    """Decode what was generated before a stop string.

    Args:
        tokenizer: The tokenizer the match was found with.
        generated_ids: Ids without the prompt; the last one is the token the match ends in.
        match: What ``StopStringMatcher.match`` found.
        skip_special_tokens: Leave special tokens out of the text.

    Returns:
        The text before the stop string; empty if that begins in the prompt.
    """
    num_cut = match.length_bytes + match.overhang_bytes
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
    for end in range(len(generated_ids) - 1, -1, -1):
        token_id = int(generated_ids[end])
        num_bytes = len(tokenizer.token_bytes(token_id))
        if num_bytes > num_cut:
            raw = detokenizer.visible_bytes(token_id)[: num_bytes - num_cut]
            text = detokenizer.push(generated_ids[:end]) + detokenizer.push_bytes(raw)
            return text + detokenizer.flush()
        num_cut -= num_bytes
    return ""


class StoppingDetokenizer:
    """An ``IncrementalDetokenizer`` that watches for stop strings, and can leave them out.

    With ``trim`` nothing of a stop string is ever returned: text that may be the beginning of
    one is held until a later token or ``flush`` decides. The joined pieces then equal
    ``trim_stop_string``. Without ``trim`` the pieces are those of the plain detokenizer.

    Args:
        tokenizer: Where the bytes of the tokens come from.
        matcher: The stop strings.
        trim: Leave the stop string and what follows it out of the text.
        skip_special_tokens: Leave special tokens out of the text; they still take part in
            the search.
        context_ids: The prompt; a stop string may begin in it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        matcher: StopStringMatcher,
        *,
        trim: bool = True,
        skip_special_tokens: bool = True,
        context_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens, context_ids)
        self._cursor = matcher.cursor(context_ids)
        self._trim = trim
        self._held = bytearray()
        self._visible = bytearray()  # one flag for each held byte
        self._match: StopMatch | None = None

    @property
    def match(self) -> StopMatch | None:
        """The first stop string that was completed, or None."""
        return self._match

    def push(self, ids: Iterable[int]) -> str:
        """Append token ids and return the text that is now certain, which may be empty.

        With ``trim``, ids after the stop string add nothing.
        """
        return "".join([self._push_token(int(token_id)) for token_id in ids])

    def _push_token(self, token_id: int) -> str:
        if self._match is not None:
            return "" if self._trim else self._detokenizer.push([token_id])
        self._match = self._cursor.push(token_id)
        if not self._trim:
            return self._detokenizer.push([token_id])
        raw = self._tokenizer.token_bytes(token_id)
        self._held += raw
        self._visible += bytes([bool(self._detokenizer.visible_bytes(token_id))]) * len(raw)
        if self._match is None:
            return self._release(len(self._held) - self._cursor.pending_bytes)
        num_cut = self._match.length_bytes + self._match.overhang_bytes
        text = self._release(len(self._held) - num_cut) + self._detokenizer.flush()
        self._held.clear()
        return text

    def _release(self, num_bytes: int) -> str:
        if num_bytes <= 0:  # the possible stop string begins in the prompt
            return ""
        raw = bytes(compress(self._held[:num_bytes], self._visible))
        del self._held[:num_bytes], self._visible[:num_bytes]
        return self._detokenizer.push_bytes(raw)

    def flush(self) -> str:
        """End the text: return what was held, and U+FFFD for an unfinished character."""
        return self._release(len(self._held)) + self._detokenizer.flush()
