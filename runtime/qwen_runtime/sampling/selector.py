"""From the logits of one sequence to its next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.candidates import CandidateProcessor, Candidates
from qwen_runtime.sampling.numerics import FloatArray, IdArray, softmax
from qwen_runtime.sampling.processor import (
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorCallable,
)
from qwen_runtime.sampling.rng import TokenGenerator
from qwen_runtime.sampling.shortlist import Shortlist
from qwen_runtime.sampling.warpers import TopKLogitsWarper

__all__ = ["TokenSelector", "checked_probabilities", "sample"]


def checked_probabilities(scores: FloatArray) -> FloatArray:
    """Softmax of one row or several, refusing what cannot be drawn from.

    Args:
        scores: Processed scores, [..., vocab]; ``-inf`` where a token is removed.

    Returns:
        Probabilities, [..., vocab].

    Raises:
        RequestError: If a row is all ``-inf``, or holds ``nan`` or ``+inf``.
    """
    if scores.shape[-1]:
        probabilities = softmax(scores)
        # One bad score makes its whole row nan.
        if not np.isnan(probabilities[..., 0]).any():
            return probabilities
        if np.isnan(scores).any() or np.isposinf(scores).any():
            raise RequestError(
                "scores must not hold nan or +inf when a token is drawn, but do; check the model "
                "and custom logits processors, or set remove_invalid_values=True"
            )
    raise RequestError(
        "at least one token must keep a score above -inf, but the logits processors removed all; "
        "loosen bad_words_ids, suppress_tokens, min_length or the custom processors"
    )


def sample(scores: FloatArray, generator: TokenGenerator) -> IdArray:
    """Draw one token for every row of processed scores.

    Args:
        scores: Processed scores, [rows, vocab] or one row, [vocab].
        generator: Draws the rows in order.

    Returns:
        Token ids, [rows]; [1] for one row.

    Raises:
        RequestError: If a row cannot be drawn from; see :func:`checked_probabilities`.
    """
    drawn = [_draw(Candidates.from_row(row), generator) for row in np.atleast_2d(scores)]
    return np.array(drawn, dtype=np.int64)


def _draw(candidates: Candidates, generator: TokenGenerator) -> int:
    probabilities = checked_probabilities(candidates.values)
    position = generator.choose(probabilities, candidates.indices, candidates.vocab_size)
    return candidates.token_id(position)


def _filters(processor: ProcessorCallable) -> TypeGuard[CandidateProcessor]:
    """Whether survivors alone may be given to it: a subclass may do more in its ``__call__``."""
    own = type(processor)
    return issubclass(own, CandidateProcessor) and own.__call__ is CandidateProcessor.__call__


class TokenSelector:
    """Chooses the next token of one sequence; keeps its state from step to step.

    While nobody needs the processed scores, the filters behind the first one (usually top-k)
    see only the tokens that survived it. Token and survivors are those of the plain chain.

    Args:
        processors: Applied in order.
        generator: Draws the token; None takes the token with the highest score.
        return_scores: Whether :meth:`select` returns the processed scores.
    """

    def __init__(
        self,
        processors: Sequence[ProcessorCallable] = (),
        *,
        generator: TokenGenerator | None = None,
        return_scores: bool = False,
    ) -> None:
        self._processors = LogitsProcessorList(processors)
        self._generator = generator
        self._return_scores = return_scores
        first = next((i for i, p in enumerate(processors) if _filters(p)), len(processors))
        tail = [p for p in processors[first:] if _filters(p)]
        fused = (
            generator is not None and not return_scores and len(tail) == len(processors) - first
        )
        self._dense = LogitsProcessorList(processors[:first]) if fused else self._processors
        self._tail = tail if fused else []
        self._short = [p for p in self._dense if isinstance(p, LogitsProcessor) and p.shortens()]

    @property
    def takes_best(self) -> bool:
        """Whether the token is the logits' first highest one and nothing else is returned."""
        return self._generator is None and not self._processors and not self._return_scores

    @property
    def num_top(self) -> int | None:
        """How many of the highest logits decide about the token, at least; None where all may.

        Further ones may, where processors lower the scores of the highest.
        """
        if self._return_scores or len(self._short) < len(self._dense):
            return None
        if self._generator is None:
            return 1
        # What comes before top-k's survivors are chosen must not depend on any other token.
        first = self._tail[0] if self._tail else None
        return first.top_k if type(first) is TopKLogitsWarper else None

    def shorten(
        self, input_ids: IdArray, logits: FloatArray, tokens: IdArray, vocab_size: int
    ) -> Candidates | None:
        """What :meth:`select` would draw from, out of the row's highest logits alone.

        Only where `num_top` is a number. Draws nothing; :meth:`draw` does.

        Args:
            input_ids: Prompt and tokens so far, [length] int64.
            logits: The model's highest outputs for the next token, in any order, [N] float32.
            tokens: Their ids, [N].
            vocab_size: Length of the row.

        Returns:
            The tokens that survive and their scores, the very ones of the whole row; None where
            others may count too, or where none survives.
        """
        shortlist = Shortlist.of(logits, tokens, vocab_size)
        for processor in self._short:
            if shortlist is None:
                return None
            shortlist = processor.shorten(input_ids, shortlist)
        if shortlist is None or not shortlist.settles(self.num_top or 1):
            return None
        kept = np.flatnonzero(shortlist.values != -np.inf)
        candidates = Candidates(shortlist.values[kept], shortlist.indices[kept], vocab_size)
        return self._filter(candidates) if kept.size else None

    def draw(self, candidates: Candidates) -> int:
        """Draw a token, or take the one with the highest score.

        Raises:
            RequestError: If no token can be drawn; see :func:`checked_probabilities`.
        """
        if self._generator is None:
            return candidates.token_id(int(candidates.values.argmax()))
        return _draw(candidates, self._generator)

    def select(self, input_ids: IdArray, logits: FloatArray) -> tuple[int, FloatArray | None]:
        """Choose the next token.

        Args:
            input_ids: Prompt and tokens so far, [length] int64.
            logits: The model's output for the next token, [vocab] float32. Not modified.

        Returns:
            The token id, and the processed scores, [vocab], if they were asked for.

        Raises:
            RequestError: If no token can be drawn; see :func:`checked_probabilities`.
        """
        row = logits
        if self._dense:
            row = self._dense(input_ids[None], logits[None])[0]
        if self._generator is None:
            token_id = int(row.argmax())
        else:
            token_id = _draw(self._filter(Candidates.from_row(row)), self._generator)
        if not self._return_scores:
            return token_id, None
        return token_id, row.copy() if row is logits else row

    def _filter(self, candidates: Candidates) -> Candidates:
        for processor in self._tail:
            if candidates.values.size:
                candidates = processor.apply(candidates)
        return candidates
