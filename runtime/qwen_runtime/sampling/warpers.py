"""Temperature and the filters by rank and probability: top-k, top-p, min-p; log-normalisation.

Formulas and edge behaviour are transformers' (5.23, ``generation/logits_process.py``). Where
several tokens tie at a cut, torch leaves the choice open; here the lower token id is kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qwen_runtime.sampling.candidates import CandidateFilter, CandidateProcessor, Candidates
from qwen_runtime.sampling.checks import check_fraction, check_int, check_positive_float
from qwen_runtime.sampling.numerics import (
    BoolArray,
    FloatArray,
    IdArray,
    kth_largest,
    largest_first,
    log_softmax,
    softmax,
)
from qwen_runtime.sampling.processor import LogitsProcessor
from qwen_runtime.sampling.shortlist import Shortlist

__all__ = [
    "LogitNormalization",
    "MinPLogitsWarper",
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
]

# Above this many candidates top-p drops the improbable ones by exponent before it sorts.
_SORT_DIRECTLY = 4096


class TemperatureLogitsWarper(LogitsProcessor):
    """Divide the scores by a temperature: below 1 sharper, above 1 flatter.

    Args:
        temperature: Finite float > 0.

    Raises:
        RequestError: If it is anything else.
    """

    def __init__(self, temperature: float) -> None:
        hint = "; for greedy decoding set do_sample=False" if temperature == 0 else ""
        self.temperature = check_positive_float(temperature, name="temperature", hint=hint)

    def __call__(self, input_ids: IdArray, scores: FloatArray) -> FloatArray:
        """Scale every score; see :class:`LogitsProcessor`."""
        return scores / np.float32(self.temperature)

    def shorten(self, input_ids: IdArray, shortlist: Shortlist) -> Shortlist:
        """Scale; rounding keeps the order of scores, though it may make equal what was not."""
        divisor = np.float32(self.temperature)
        return replace(
            shortlist, values=shortlist.values / divisor, bound=shortlist.bound / divisor
        )


class TopKLogitsWarper(CandidateFilter):
    """Keep the k largest scores, and every score equal to the k-th.

    Args:
        top_k: How many to keep, >= 1; the vocabulary's size when larger.
        min_tokens_to_keep: Lower bound of ``top_k``, >= 1.

    Raises:
        RequestError: If either is not such an integer.
    """

    def __init__(self, top_k: int, min_tokens_to_keep: int = 1) -> None:
        check_int(top_k, name="top_k", minimum=1)
        check_int(min_tokens_to_keep, name="min_tokens_to_keep", minimum=1)
        self.top_k = max(top_k, min_tokens_to_keep)
        self.min_tokens_to_keep = min_tokens_to_keep

    def keep(self, values: FloatArray) -> BoolArray:
        """See :class:`CandidateFilter`."""
        k = min(self.top_k, values.shape[0])
        below: BoolArray = values < kth_largest(values, k)
        return np.logical_not(below, out=below)


class TopPLogitsWarper(CandidateFilter):
    """Keep the most probable tokens that together hold at least ``top_p`` (nucleus sampling).

    Counted from the least probable token upwards: a token goes while the mass up to and
    including it is at most ``1 - top_p``.

    Args:
        top_p: Mass to keep, in [0, 1]; 0 keeps ``min_tokens_to_keep``.
        min_tokens_to_keep: The most probable tokens that always stay, >= 1.

    Raises:
        RequestError: If an argument is out of its range.

    Source:
        The Curious Case of Neural Text Degeneration, arXiv:1904.09751.
    """

    def __init__(self, top_p: float, min_tokens_to_keep: int = 1) -> None:
        self.top_p = check_fraction(top_p, name="top_p")
        self.min_tokens_to_keep = check_int(
            min_tokens_to_keep, name="min_tokens_to_keep", minimum=1
        )

    def keep(self, values: FloatArray) -> BoolArray:
        """See :class:`CandidateFilter`."""
        size = values.shape[0]
        probabilities = softmax(values)
        if np.isnan(probabilities[0]):  # softmax makes all of a row nan or nothing
            return np.ones(size, dtype=np.bool_)
        removable = np.float32(1 - self.top_p)
        positions, mass = _heavy(probabilities, float(removable), self.min_tokens_to_keep)
        # Ascending; equal scores with the higher id first, so that the lower id survives.
        backwards = positions[::-1]
        order = backwards[np.argsort(values[backwards], kind="stable")]
        cumulative = (mass + np.cumsum(probabilities[order], dtype=np.float64)).astype(np.float32)
        stays = ~(cumulative <= removable)
        stays[-self.min_tokens_to_keep :] = True
        keep = np.zeros(size, dtype=np.bool_)
        keep[order[stays]] = True
        return keep


def _heavy(probabilities: FloatArray, removable: float, at_least: int) -> tuple[IdArray, float]:
    """Set aside improbable tokens that certainly go, so that fewer have to be sorted.

    Whole powers of two go, from the smallest up, while their mass stays clearly below
    ``removable`` and ``at_least`` tokens remain.

    Returns:
        Positions of the remaining tokens, ascending, and the mass of those set aside.
    """
    size = probabilities.shape[0]
    if size <= _SORT_DIRECTLY:
        return np.arange(size), 0.0
    # The exponent bits of a float32 >= 0 order it by powers of two.
    exponents = np.right_shift(probabilities.view(np.int32), 23)
    counts = np.bincount(exponents, minlength=128)
    masses = np.bincount(exponents, weights=probabilities, minlength=128)
    gone = (np.cumsum(masses) < 0.999 * removable) & (size - np.cumsum(counts) >= at_least)
    first = int(np.argmin(gone))  # the last is never gone: nothing would remain
    positions: IdArray = np.flatnonzero(exponents >= first)
    return positions, float(masses[:first].sum())


class MinPLogitsWarper(CandidateFilter):
    """Keep tokens at least ``min_p`` times as probable as the most probable one.

    Args:
        min_p: Fraction of the largest probability, in [0, 1].
        min_tokens_to_keep: The most probable tokens that always stay, >= 1.

    Raises:
        RequestError: If an argument is out of its range.

    Source:
        Turning Up the Heat: Min-p Sampling, arXiv:2407.01082.
    """

    def __init__(self, min_p: float, min_tokens_to_keep: int = 1) -> None:
        self.min_p = check_fraction(min_p, name="min_p")
        self.min_tokens_to_keep = check_int(
            min_tokens_to_keep, name="min_tokens_to_keep", minimum=1
        )

    def keep(self, values: FloatArray) -> BoolArray:
        """See :class:`CandidateFilter`."""
        probabilities = softmax(values)
        keep: BoolArray = ~(probabilities < np.float32(self.min_p) * probabilities.max())
        keep[largest_first(probabilities, self.min_tokens_to_keep)] = True
        return keep


class LogitNormalization(CandidateProcessor):
    """Turn scores into log-probabilities; always the last processor."""

    def apply(self, candidates: Candidates) -> Candidates:
        """Normalise the survivors of one row."""
        return Candidates(
            log_softmax(candidates.values), candidates.indices, candidates.vocab_size
        )
