"""Candidate tokens for assisted generation: where they come from and which are accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qwen_runtime.errors import RequestError
from qwen_runtime.generation.base import FloatArray, IntArray
from qwen_runtime.sampling import LogitsProcessorList, TokenGenerator, TorchGenerator
from qwen_runtime.text import Tokenizer

__all__ = [
    "AssistedStatistics",
    "DraftLength",
    "DraftSettings",
    "accept_drawn",
    "look_up",
    "require_same_vocabulary",
    "skip_draws",
]


_LEAST = float(np.finfo(np.float32).min)
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, slots=True)
class AssistedStatistics:
    """What assistance saved."""

    drafted: int
    """Candidate tokens that were checked."""
    accepted: int
    """Of these, the ones that are part of the output."""
    model_calls: int
    """Calls of the model; plain decoding makes one per token."""
    draft_calls: int
    """Calls of the draft model; 0 with prompt lookup."""


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """How a draft model is used; from its own generation settings, as in transformers."""

    num_assistant_tokens: int
    """Tokens drafted per round."""
    num_assistant_tokens_schedule: str
    """"constant", "heuristic" or "heuristic_transient"."""
    assistant_confidence_threshold: float
    """Drafting ends after a token below this probability."""
    max_context: int
    """Tokens that the draft model can hold; beyond them nothing is drafted."""


class DraftLength:
    """How many tokens to draft, adapted to how many are accepted.

    Args:
        start: Tokens in the first round.
        schedule: "constant" keeps it; the others add 2 after a round that was accepted whole and
            take away 1 after any other.
    """

    def __init__(self, start: int, schedule: str) -> None:
        self.value = start
        self._adapts = schedule != "constant"

    def update(self, *, all_accepted: bool) -> None:
        """Take note of a round."""
        if self._adapts:
            self.value = self.value + 2 if all_accepted else max(1, self.value - 1)


def look_up(
    ids: IntArray,
    num_tokens: int,
    max_ngram_size: int,
    *,
    eos_token_ids: Sequence[int] = (),
    vocab_size: int = 0,
    processors: LogitsProcessorList | None = None,
) -> IntArray:
    """Guess how a sequence goes on from what followed its last tokens earlier.

    The longest n-gram at the end is looked up first, from left to right. A token that the
    processors forbid ends the guess, and if it is the first one the search goes on.

    Args:
        ids: The sequence, [length].
        num_tokens: Most tokens to guess.
        max_ngram_size: Longest n-gram to look up.
        eos_token_ids: A guess ends before one of these.
        vocab_size: Number of scores that the processors work on.
        processors: Tell which tokens are forbidden; none are without.

    Returns:
        The guess, [0..num_tokens].

    Source:
        Prompt lookup decoding, as in ``PromptLookupCandidateGenerator`` of transformers 5.23.
    """
    length = ids.shape[0]
    for size in range(min(max_ngram_size, length - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(ids, size)
        for start in np.flatnonzero((windows == ids[-size:]).all(axis=1)).tolist():
            guess = ids[start + size : start + size + num_tokens]
            if processors:
                guess = guess[: _num_allowed(ids, guess, processors, vocab_size)]
            if guess.shape[0]:
                ends = np.flatnonzero(np.isin(guess, eos_token_ids))
                return guess[: ends[0]] if ends.shape[0] else guess
    return ids[:0]


def _num_allowed(
    ids: IntArray, guess: IntArray, processors: LogitsProcessorList, vocab_size: int
) -> int:
    even = np.ones((1, vocab_size), np.float32)
    whole = np.concatenate([ids, guess])[None]
    for count, token in enumerate(guess.tolist()):
        score = processors(whole[:, : ids.shape[0] + count], even)[0, token]
        # A score of -inf may have been replaced by the least number (remove_invalid_values).
        if score <= _LEAST:
            return count
    return len(guess)


def accept_drawn(
    candidates: Sequence[int],
    drafted: Sequence[FloatArray],
    target: Callable[[int], FloatArray],
    generator: TokenGenerator,
    ensemble_weight: float | None = None,
) -> list[int]:
    """Keep candidates so that the output is distributed as if the model had drawn it.

    Args:
        candidates: Tokens that were drawn from the draft's distributions, [n].
        drafted: These distributions, [V] each.
        target: The model's distribution at position 0..n, [V]; asked for only as far as needed.
        generator: Draws n uniform numbers, then one token.
        ensemble_weight: Accept the mixture ``w * model + (1 - w) * draft`` instead; more tokens
            are accepted, and the output is not the model's own any more. None is exact.

    Returns:
        The accepted candidates and one token more.

    Source:
        Leviathan et al., arXiv:2211.17192, algorithm 1. The mixture: ``_speculative_sampling`` of
        transformers 5.23.
    """
    weight = np.float32(1 if ensemble_weight is None else ensemble_weight)
    uniform = generator.rand(len(candidates))
    for position, (token, draft) in enumerate(zip(candidates, drafted, strict=True)):
        model = target(position)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = 1 - weight + weight * (model[token] / draft[token])
        if uniform[position] <= ratio:
            continue
        residual = np.maximum(model - draft, 0)
        total = residual.sum(dtype=np.float64)
        # Both distributions are the same up to rounding: nothing is left to draw from.
        last = model if total <= _TINY else residual / np.float32(total)
        return [*candidates[:position], generator.choose(last, None, last.shape[0])]
    last = target(len(candidates))
    return [*candidates, generator.choose(last, None, last.shape[0])]


def skip_draws(generator: TokenGenerator, count: int, vocab_size: int) -> None:
    """Pass the numbers that torch draws for positions nobody looks at."""
    if isinstance(generator, TorchGenerator):
        for _ in range(count):
            generator.skip(vocab_size)


def require_same_vocabulary(
    ours: int, theirs: int, tokenizer: Tokenizer | None, of_the_draft: Tokenizer | None
) -> None:
    """Check that a draft's tokens are the model's.

    Args:
        ours: The model's number of logits.
        theirs: The draft's.
        tokenizer: The model's tokenizer; None for a bundle of token ids.
        of_the_draft: The draft's.

    Raises:
        RequestError: If they are not.
    """
    if ours != theirs:
        raise RequestError(
            f"assistant_model must have the model's {ours} logits, got {theirs}; use a draft "
            "of the same family",
            param="assistant_model",
        )
    if (
        tokenizer is not None
        and of_the_draft is not None
        and tokenizer.vocabulary_bytes() != of_the_draft.vocabulary_bytes()
    ):
        raise RequestError(
            "assistant_model must have the model's vocabulary, got one with other tokens; use a "
            "draft of the same family",
            param="assistant_model",
        )
