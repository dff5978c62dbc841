"""From the logits of one sequence to its next token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.sampling.candidates import CandidateProcessor, Candidates
from qwen_runtime.sampling.numerics import FloatArray, IdArray, softmax
from qwen_runtime.sampling.processor import LogitsProcessorList, ProcessorCallable
from qwen_runtime.sampling.rng import TokenGenerator

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
        first = next(
            (i for i, p in enumerate(processors) if isinstance(p, CandidateProcessor)),
            len(processors),
        )
        tail = [p for p in processors[first:] if isinstance(p, CandidateProcessor)]
        fused = (
            generator is not None and not return_scores and len(tail) == len(processors) - first
        )
        self._dense = LogitsProcessorList(processors[:first]) if fused else self._processors
        self._tail = tail if fused else []

    @property
    def takes_best(self) -> bool:
        """Whether the token is the logits' first highest one and nothing else is returned."""
        return self._generator is None and not self._processors and not self._return_scores

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
            candidates = Candidates.from_row(row)
            for processor in self._tail:
                if candidates.values.size:
                    candidates = processor.apply(candidates)
            token_id = _draw(candidates, self._generator)
        if not self._return_scores:
            return token_id, None
        return token_id, row.copy() if row is logits else row
