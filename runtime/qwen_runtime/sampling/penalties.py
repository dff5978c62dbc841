"""Processors that make tokens of the prompt or the output less or more likely.

Repetition, encoder repetition and length penalties are transformers' (5.23); presence and
frequency penalty are OpenAI's.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.checks import check_int, check_positive_float, token_ids
from qwen_runtime.sampling.numerics import FloatArray, IdArray
from qwen_runtime.sampling.processor import LogitsProcessor
from qwen_runtime.sampling.seen import SeenTokens
from qwen_runtime.sampling.shortlist import Shortlist

__all__ = [
    "EncoderRepetitionPenaltyLogitsProcessor",
    "ExponentialDecayLengthPenalty",
    "FrequencyPenaltyLogitsProcessor",
    "PresencePenaltyLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
]


def _penalize(row: FloatArray, ids: IdArray, penalty: np.float32) -> None:
    """Divide positive scores of ``ids`` and multiply negative ones, in place."""
    values = row[ids]
    # Duplicate ids are harmless: each writes the same value, computed from the original one.
    row[ids] = np.where(values < 0, values * penalty, values / penalty)


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Penalise every token that occurs in the prompt or the output, once.

    Args:
        penalty: Float > 0; above 1 discourages repetition, below 1 rewards it.
        prompt_ignore_length: Leading positions that do not count: one number for all rows, or
            one per row, [rows] (left padding). None counts everything.

    Raises:
        RequestError: If an argument is out of its range.

    Source:
        CTRL, arXiv:1909.05858, section 4.1.
    """

    def __init__(
        self, penalty: float, prompt_ignore_length: int | Iterable[int] | None = None
    ) -> None:
        self.penalty = check_positive_float(penalty, name="repetition_penalty")
        self._factor = np.float32(penalty)
        self.prompt_ignore_length: int | list[int] | None
        if prompt_ignore_length is None or isinstance(prompt_ignore_length, int):
            self.prompt_ignore_length = prompt_ignore_length
        else:
            self.prompt_ignore_length = [int(length) for length in prompt_ignore_length]
        token_ids(self.prompt_ignore_length or 0, name="prompt_ignore_length")
        self._seen: SeenTokens | None = None

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Penalise seen tokens; see :class:`LogitsProcessor`."""
        rows, vocab_size = scores.shape
        skip = self.prompt_ignore_length
        if skip is None or isinstance(skip, int):
            skip = [skip or 0] * rows
        if len(skip) != rows:
            raise RequestError(
                f"prompt_ignore_length must have one entry per row, got {len(skip)} for {rows} "
                "rows; pass one number or one per row",
                param="prompt_ignore_length",
            )
        processed = scores.copy()
        if rows == 1:
            seen = self._seen_tokens(vocab_size).update(input_ids[0, skip[0] :])
            _penalize(processed[0], seen, self._factor)
            return processed
        for row, ids, start in zip(processed, input_ids, skip, strict=True):
            counted = ids[start:]
            _penalize(row, counted[counted < vocab_size], self._factor)
        return processed

    def shorten(self, input_ids: IdArray, shortlist: Shortlist) -> Shortlist | None:
        """Penalise seen tokens; the others may be raised, if at all, where it is a reward."""
        if not self._factor:  # rounded to 0: makes nan of 0 and -inf, which no bound covers
            return None
        skip = self.prompt_ignore_length
        start = skip if isinstance(skip, int) else 0 if skip is None else skip[0]
        tokens = self._seen_tokens(shortlist.vocab_size)
        tokens.update(input_ids[start:])
        # The bound is processed as one more score, of a token that was seen.
        scores = np.append(shortlist.values, shortlist.bound)
        seen = np.append(tokens.among(shortlist.indices), True)
        _penalize(scores, np.flatnonzero(seen), self._factor)
        return replace(shortlist, values=scores[:-1], bound=max(shortlist.bound, scores[-1]))

    def _seen_tokens(self, vocab_size: int) -> SeenTokens:
        """Distinct ids of a sequence of its own, kept from step to step."""
        if self._seen is None or self._seen.vocab_size != vocab_size:
            self._seen = SeenTokens(vocab_size)
        return self._seen


class EncoderRepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Reward every token of the prompt: the inverse of the repetition penalty.

    Args:
        penalty: Float > 0; above 1 makes tokens of the prompt more likely.
        encoder_input_ids: The prompts, [prompts, length], padding included. Each serves
            ``rows / prompts`` consecutive rows.

    Raises:
        RequestError: If ``penalty`` is out of its range.
    """

    def __init__(self, penalty: float, encoder_input_ids: IdArray) -> None:
        check_positive_float(penalty, name="encoder_repetition_penalty")
        self.penalty = 1 / penalty
        self.encoder_input_ids = encoder_input_ids

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Reward prompt tokens; see :class:`LogitsProcessor`."""
        processed = scores.copy()
        rows_per_prompt = max(1, scores.shape[0] // self.encoder_input_ids.shape[0])
        for index, row in enumerate(processed):
            prompt = self.encoder_input_ids[index // rows_per_prompt]
            _penalize(row, prompt[prompt < scores.shape[1]], np.float32(self.penalty))
        return processed


class _OutputPenalty(LogitsProcessor):
    """Base of the penalties on generated tokens only."""

    def __init__(self, penalty: float, prompt_length: int, *, name: str) -> None:
        if isinstance(penalty, bool) or not math.isfinite(penalty):
            raise RequestError(f"{name} must be a finite number, got {penalty!r}", param=name)
        self.penalty = float(penalty)
        self.prompt_length = check_int(prompt_length, name="prompt_length", minimum=0)

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Penalise generated tokens; see :class:`LogitsProcessor`."""
        processed = scores.copy()
        for row, ids in zip(processed, input_ids, strict=True):
            generated, amounts = self._counted(ids, row.shape[0])
            row[generated] -= amounts
        return processed

    def shorten(self, input_ids: IdArray, shortlist: Shortlist) -> Shortlist:
        """Penalise generated tokens; a negative penalty raises the bound as far as any of them."""
        generated, amounts = self._counted(input_ids, shortlist.vocab_size)
        positions, here = shortlist.locate(generated)
        values = shortlist.values.copy()
        values[positions] -= amounts[here]
        bounds = shortlist.bound - amounts[~here]
        return replace(shortlist, values=values, bound=bounds.max(initial=shortlist.bound))

    def _counted(self, ids: IdArray, vocab_size: int) -> tuple[IdArray, FloatArray]:
        """Distinct generated ids of one row, and what each one's score loses."""
        generated = ids[self.prompt_length :]
        distinct, counts = np.unique(generated[generated < vocab_size], return_counts=True)
        return distinct, self._amounts(counts)

    @abstractmethod
    def _amounts(self, counts: IdArray) -> FloatArray:
        """What scores lose whose tokens occur so often, [distinct]."""


class PresencePenaltyLogitsProcessor(_OutputPenalty):
    """Subtract a constant from every token generated so far (prompt tokens do not count).

    Args:
        penalty: Finite number; above 0 discourages repetition.
        prompt_length: Length of the prompt, padding included.

    Source:
        OpenAI API reference, ``presence_penalty``.
    """

    def __init__(self, penalty: float, prompt_length: int) -> None:
        super().__init__(penalty, prompt_length, name="presence_penalty")

    def _amounts(self, counts: IdArray) -> FloatArray:
        return np.full(counts.shape, self.penalty, np.float32)


class FrequencyPenaltyLogitsProcessor(_OutputPenalty):
    """Subtract a constant per occurrence from tokens generated so far.

    Args:
        penalty: Finite number; above 0 discourages repetition.
        prompt_length: Length of the prompt, padding included.

    Source:
        OpenAI API reference, ``frequency_penalty``.
    """

    def __init__(self, penalty: float, prompt_length: int) -> None:
        super().__init__(penalty, prompt_length, name="frequency_penalty")

    def _amounts(self, counts: IdArray) -> FloatArray:
        return counts.astype(np.float32) * np.float32(self.penalty)


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """Raise the score of the end tokens ever more once enough tokens are generated.

    Args:
        exponential_decay_length_penalty: ``(start, factor)``: after ``start`` generated tokens
            an end token's score ``s`` becomes ``s + |s| * (factor ** n - 1)`` with n counting
            the tokens since.
        eos_token_id: End token or tokens.
        input_ids_seq_length: Length of the prompt, padding included.

    Raises:
        RequestError: If an end token is not an id.
    """

    def __init__(
        self,
        exponential_decay_length_penalty: tuple[int, float],
        eos_token_id: int | Iterable[int],
        input_ids_seq_length: int,
    ) -> None:
        start, factor = exponential_decay_length_penalty
        self.regulation_start = start + input_ids_seq_length
        self.regulation_factor = factor
        self.eos_token_id = token_ids(eos_token_id, name="eos_token_id")

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Raise the end tokens; see :class:`LogitsProcessor`."""
        excess = input_ids.shape[1] - self.regulation_start
        if excess <= 0:
            return scores
        ids = np.array([i for i in self.eos_token_id if i < scores.shape[1]], dtype=np.int64)
        processed = scores.copy()
        values = scores[:, ids]
        largest = np.finfo(np.float32).max
        with np.errstate(over="ignore", invalid="ignore"):
            growth = np.float64(self.regulation_factor) ** excess - 1
            raised = values + np.abs(values) * growth
        # Clipped, so that a growth beyond float32 still forces the end instead of giving inf.
        raised = np.clip(raised, -largest, largest).astype(np.float32)
        processed[:, ids] = np.where(np.isfinite(values), raised, values)
        return processed
