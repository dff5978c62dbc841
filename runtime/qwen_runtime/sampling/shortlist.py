"""A row of scores of which only the highest are known, and what they prove about the others.

A device chooses a row's highest logits and brings those alone. A processor works on them as it
does on whole rows, number by number, and on a bound that no other token's score exceeds. Where
what decides lies above the bound, it is what the whole row would have given; elsewhere the whole
row is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from qwen_runtime.sampling.numerics import BoolArray, FloatArray, IdArray, kth_largest

__all__ = ["Shortlist"]


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Scores of some tokens of a row, and a bound on those of all others."""

    values: FloatArray
    """Scores, [N]; not to be written to."""
    indices: IdArray
    """Their token ids, [N], ascending."""
    vocab_size: int
    """Length of the row."""
    bound: np.float32
    """No other token has a higher score; ``-inf`` where no other one counts."""

    @classmethod
    def of(cls, logits: FloatArray, tokens: IdArray, vocab_size: int) -> Shortlist | None:
        """Take a row's highest logits, as a device brings them.

        Args:
            logits: The highest, in any order, [N] with N > 0.
            tokens: Their distinct ids, [N].
            vocab_size: Length of the row.

        Returns:
            The shortlist; None where the row must be looked at whole: it holds a ``nan``, or
            places are filled up with ids outside of the vocabulary.
        """
        if np.isnan(logits).any() or tokens.min() < 0 or tokens.max() >= vocab_size:
            return None
        order = np.argsort(tokens)
        whole = tokens.shape[0] == vocab_size
        bound = np.float32(-np.inf) if whole else np.float32(logits.min())
        return cls(logits[order], tokens[order], vocab_size, bound)

    def settles(self, count: int) -> bool:
        """Whether the ``count`` highest scores of the row, and all equal to the last, are here."""
        if self.bound == -np.inf:
            return True
        enough = count <= self.values.shape[0]
        return enough and bool(kth_largest(self.values, count) > self.bound)

    def locate(self, ids: IdArray) -> tuple[IdArray, BoolArray]:
        """Find tokens.

        Args:
            ids: Token ids, [M].

        Returns:
            Positions in ``values`` of those that are here, and which of ``ids`` they are, [M].
        """
        positions = np.minimum(np.searchsorted(self.indices, ids), self.indices.shape[0] - 1)
        here: BoolArray = self.indices[positions] == ids
        return positions[here], here

    def without(self, ids: IdArray) -> Shortlist:
        """The shortlist with the given tokens, [M], at ``-inf``."""
        positions, _ = self.locate(ids)
        values = self.values.copy()
        values[positions] = -np.inf
        return replace(self, values=values)
