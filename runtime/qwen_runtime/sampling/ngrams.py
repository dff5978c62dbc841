"""Processors that ban the token that would complete an n-gram seen before."""

from __future__ import annotations

import numpy as np

from qwen_runtime.sampling.checks import check_int
from qwen_runtime.sampling.numerics import FloatArray, IdArray
from qwen_runtime.sampling.processor import LogitsProcessor
from qwen_runtime.sampling.shortlist import Shortlist

__all__ = ["EncoderNoRepeatNGramLogitsProcessor", "NoRepeatNGramLogitsProcessor"]


def _completions(text: IdArray, prefix: IdArray) -> IdArray:
    """The tokens that follow ``prefix`` wherever it occurs in ``text`` and something follows."""
    windows = max(text.shape[0] - prefix.shape[0], 0)
    matches = np.ones(windows, dtype=np.bool_)
    for offset, token_id in enumerate(prefix):
        matches &= text[offset : offset + windows] == token_id
    completions: IdArray = text[prefix.shape[0] :][matches]
    return completions


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """No n-gram may occur twice in prompt and output together.

    Args:
        ngram_size: n >= 1; 1 bans every token seen.

    Raises:
        RequestError: If it is not such an integer.
    """

    def __init__(self, ngram_size: int) -> None:
        self.ngram_size = check_int(ngram_size, name="no_repeat_ngram_size", minimum=1)

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Ban completions; see :class:`LogitsProcessor`."""
        length = input_ids.shape[1]
        if length < self.ngram_size:
            return scores
        processed = scores.copy()
        for row, ids in zip(processed, input_ids, strict=True):
            banned = _completions(ids, ids[length + 1 - self.ngram_size :])
            row[banned[banned < row.shape[0]]] = -np.inf
        return processed

    def shorten(self, input_ids: IdArray, shortlist: Shortlist) -> Shortlist:
        """Ban completions; see :meth:`LogitsProcessor.shorten`."""
        length = input_ids.shape[0]
        if length < self.ngram_size:
            return shortlist
        return shortlist.without(
            _completions(input_ids, input_ids[length + 1 - self.ngram_size :])
        )


class EncoderNoRepeatNGramLogitsProcessor(LogitsProcessor):
    """No n-gram of the prompt may occur in the output.

    Args:
        encoder_ngram_size: n >= 1.
        encoder_input_ids: The prompts, [prompts, length] or [length], padding included. Each
            serves ``rows / prompts`` consecutive rows.

    Raises:
        RequestError: If the size is not such an integer.
    """

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: IdArray) -> None:
        self.ngram_size = check_int(
            encoder_ngram_size, name="encoder_no_repeat_ngram_size", minimum=1
        )
        self.encoder_input_ids = np.atleast_2d(encoder_input_ids)

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Ban completions; see :class:`LogitsProcessor`."""
        length = input_ids.shape[1]
        if length < self.ngram_size - 1:
            return scores
        processed = scores.copy()
        rows_per_prompt = max(1, scores.shape[0] // self.encoder_input_ids.shape[0])
        for index, row in enumerate(processed):
            prompt = self.encoder_input_ids[index // rows_per_prompt]
            banned = _completions(prompt, input_ids[index, length + 1 - self.ngram_size :])
            row[banned[banned < row.shape[0]]] = -np.inf
        return processed
