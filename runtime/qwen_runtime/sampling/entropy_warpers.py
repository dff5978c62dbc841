"""The filters that look at the entropy or an absolute cut: typical, epsilon, eta, top-h.

Formulas and edge behaviour are transformers' (5.23, ``generation/logits_process.py``).
"""

from __future__ import annotations

import numpy as np

from qwen_runtime.sampling.candidates import CandidateFilter
from qwen_runtime.sampling.checks import check_fraction, check_int
from qwen_runtime.sampling.numerics import (
    BoolArray,
    FloatArray,
    entropy,
    kth_largest,
    largest_first,
    log_softmax,
    softmax,
)

__all__ = [
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "TopHLogitsWarper",
    "TypicalLogitsWarper",
]

# transformers looks at no more than the 100 best tokens in top-h.
_TOP_H_TOKENS = 100


class TypicalLogitsWarper(CandidateFilter):
    """Keep the tokens whose surprise is closest to the entropy, up to a probability mass.

    Args:
        mass: Mass to keep, in (0, 1).
        min_tokens_to_keep: The most typical tokens that always stay, >= 1.

    Raises:
        RequestError: If an argument is out of its range.

    Source:
        Locally Typical Sampling, arXiv:2202.00666.
    """

    def __init__(self, mass: float = 0.9, min_tokens_to_keep: int = 1) -> None:
        self.mass = check_fraction(mass, name="typical_p", open_low=True, open_high=True)
        self.min_tokens_to_keep = check_int(
            min_tokens_to_keep, name="min_tokens_to_keep", minimum=1
        )

    def keep(self, values: FloatArray) -> BoolArray:
        """See :class:`CandidateFilter`."""
        distance = np.abs(-log_softmax(values) - entropy(values))
        order = np.argsort(distance, kind="stable")
        cumulative = np.cumsum(softmax(values[order]), dtype=np.float64).astype(np.float32)
        last = min(int(np.count_nonzero(cumulative < self.mass)), values.shape[0] - 1)
        keep: BoolArray = ~(distance > distance[order[last]])
        keep[order[: self.min_tokens_to_keep]] = True
        return keep


class EpsilonLogitsWarper(CandidateFilter):
    """Keep tokens with at least an absolute probability.

    Args:
        epsilon: Least probability, in (0, 1).
        min_tokens_to_keep: The most probable tokens that always stay, >= 1.

    Raises:
        RequestError: If an argument is out of its range.

    Source:
        Truncation Sampling as Language Model Desmoothing, arXiv:2210.15191.
    """

    def __init__(self, epsilon: float, min_tokens_to_keep: int = 1) -> None:
        self.epsilon = check_fraction(
            epsilon, name="epsilon_cutoff", open_low=True, open_high=True
        )
        self.min_tokens_to_keep = check_int(
            min_tokens_to_keep, name="min_tokens_to_keep", minimum=1
        )

    def keep(self, values: FloatArray) -> BoolArray:
        """See :class:`CandidateFilter`."""
        return _above(values, np.float32(self.epsilon), self.min_tokens_to_keep)


class EtaLogitsWarper(CandidateFilter):
    """Keep tokens above a cut that falls with the entropy of the distribution.

    Args:
        epsilon: Upper bound of the cut, in (0, 1).
        min_tokens_to_keep: The most probable tokens that always stay, >= 1.

    Raises:
        RequestError: If an argument is out of its range.

    Source:
        Truncation Sampling as Language Model Desmoothing, arXiv:2210.15191.
    """

    def __init__(self, epsilon: float, min_tokens_to_keep: int = 1) -> None:
        checked = check_fraction(epsilon, name="eta_cutoff", open_low=True, open_high=True)
        self.epsilon = np.float32(checked)
        self.min_tokens_to_keep = check_int(
            min_tokens_to_keep, name="min_tokens_to_keep", minimum=1
        )

    def keep(self, values: FloatArray) -> BoolArray:
        """See :class:`CandidateFilter`."""
        spread = np.sqrt(self.epsilon) * np.exp(-entropy(values))
        return _above(values, np.minimum(self.epsilon, spread), self.min_tokens_to_keep)


def _above(values: FloatArray, cut: np.float32, at_least: int) -> BoolArray:
    """Where the probability reaches ``cut`` or the score is among the ``at_least`` largest."""
    top = kth_largest(values, min(at_least, values.shape[0]))
    keep: BoolArray = ~((softmax(values) < cut) & (values < top))
    return keep


class TopHLogitsWarper(CandidateFilter):
    """Keep the most probable tokens while their entropy stays within a share of the whole.

    Args:
        top_h: Share of the entropy of the 100 best tokens, in (0, 1].

    Raises:
        RequestError: If it is out of its range.

    Source:
        Top-H Decoding, arXiv:2509.02510.
    """

    def __init__(self, top_h: float) -> None:
        self.top_h = check_fraction(top_h, name="top_h", open_low=True)

    def keep(self, values: FloatArray) -> BoolArray:
        """See :class:`CandidateFilter`."""
        best = largest_first(values, _TOP_H_TOKENS)
        probabilities = softmax(values[best])
        bound = entropy(values[best]) * np.float32(self.top_h)
        with np.errstate(divide="ignore", invalid="ignore"):
            # An underflowed probability gives nan, which ends the kept prefix.
            terms = -probabilities * np.log(probabilities)
        within = np.cumsum(terms, dtype=np.float64).astype(np.float32) <= bound
        within[0] = True
        keep = np.zeros(values.shape[0], dtype=np.bool_)
        keep[best[within]] = True
        return keep
