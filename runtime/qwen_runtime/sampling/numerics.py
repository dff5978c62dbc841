"""Float32 arithmetic the samplers share: softmax, log-softmax and the k-th largest value.

Sums run in float64 and are rounded once, so that a result does not depend on how many removed
tokens (probability zero) stand between the surviving ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BoolArray",
    "FloatArray",
    "IdArray",
    "entropy",
    "kth_largest",
    "largest_first",
    "log_softmax",
    "softmax",
]

FloatArray = NDArray[np.float32]
IdArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Below this many values a plain partition is as fast as the two-step search.
_PLAIN_PARTITION = 4096
# Rows folded into one maximum: 64 leaves 2,374 maxima of a 151,936 token vocabulary.
_FOLD = 64


def softmax(values: FloatArray) -> FloatArray:
    """Probabilities along the last axis.

    Args:
        values: Scores, [..., N] with N > 0. ``-inf`` gets probability 0.

    Returns:
        Probabilities, [..., N]. A row that is all ``-inf`` or holds ``nan`` or ``+inf`` is ``nan``.
    """
    with np.errstate(invalid="ignore"):
        powers = np.exp(values - values.max(axis=-1, keepdims=True))
        totals = powers.sum(axis=-1, keepdims=True, dtype=np.float64)
        probabilities: FloatArray = powers / totals.astype(np.float32)
    return probabilities


def log_softmax(values: FloatArray) -> FloatArray:
    """Natural logarithm of :func:`softmax`, computed without underflow.

    Args:
        values: Scores, [..., N] with N > 0.

    Returns:
        Log-probabilities, [..., N]; ``-inf`` stays ``-inf``.
    """
    with np.errstate(invalid="ignore"):
        shifted = values - values.max(axis=-1, keepdims=True)
        totals = np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)
        normalized: FloatArray = shifted - np.log(totals).astype(np.float32)
    return normalized


def entropy(values: FloatArray) -> np.float32:
    """Shannon entropy in nats of the softmax of finite scores, [N]."""
    log_probabilities = log_softmax(values)
    total = np.sum(log_probabilities * np.exp(log_probabilities), dtype=np.float64)
    return np.float32(-total)


def kth_largest(values: FloatArray, k: int) -> np.float32:
    """The k-th largest of N values, counting equal values separately.

    Args:
        values: Any order, [N]. ``nan`` counts as the largest, as in ``torch.topk``.
        k: Rank, 1 <= k <= N.

    Returns:
        The value.
    """
    size = values.shape[0]
    width = size // _FOLD
    if size > _PLAIN_PARTITION and k <= width // 4:
        # k column maxima reach the bound, so at least k values do: the k-th largest is among them.
        maxima = np.maximum.reduce(values[: width * _FOLD].reshape(_FOLD, width), axis=0)
        bound = np.partition(maxima, width - k)[width - k]
        candidates = values[values >= bound]
        if candidates.shape[0] >= k:  # fewer only when the bound is nan
            values = candidates
            size = candidates.shape[0]
    return np.float32(np.partition(values, size - k)[size - k])


def largest_first(values: FloatArray, count: int) -> IdArray:
    """Positions of the largest values, largest first; of equal values the first position first.

    Args:
        values: Any order, [N].
        count: How many are wanted; N when larger.

    Returns:
        Positions, [min(count, N)].
    """
    count = min(count, values.shape[0])
    positions = np.flatnonzero(~(values < kth_largest(values, count)))
    order = np.argsort(-values[positions], kind="stable")
    chosen: IdArray = positions[order[:count]]
    return chosen
